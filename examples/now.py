"""Has itself saved in the middle of its work: ckpt.now().

    ckpt api python > ckpt.py
    ckpt --backend preload run -D saved -- python3 now.py       saved/1, or where the argument says
    ckpt restore -D saved/latest                                goes on from the middle
"""

import sys

import ckpt

total = 0
for n in range(1, 1001):
    total += n
    if n == 500:
        try:
            outcome = ckpt.now(sys.argv[1] if len(sys.argv) > 1 else None)
            print("restored" if outcome == ckpt.RESTORED else "saved", flush=True)
        except OSError as error:
            print("not saved:", error.strerror, flush=True)
print("sum", total)
