"""Does something when it has come out of an image: ckpt.restored().

    ckpt api python > ckpt.py
    ckpt --backend preload run -- python3 restored.py
"""

import time

import ckpt

print("under ckpt" if ckpt.available() else "not under ckpt", flush=True)
life = None
while ckpt.available():
    if ckpt.restored() != life:
        life = ckpt.restored()
        print("life", life, flush=True)
    time.sleep(0.001)
