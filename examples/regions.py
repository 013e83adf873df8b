"""Keeps checkpoints out of a piece of work: ckpt.uninterrupted().

It moves amounts between two accounts, each in a file of its own. Files are not part of an image: one that was made between
the two writes would come back to accounts that do not fit.

    ckpt api python > ckpt.py
    ckpt --backend preload run -- python3 regions.py ROUNDS     0: until it is ended
"""

import sys
import time

import ckpt


@ckpt.uninterrupted()
def put(account, amount):
    with open(account, "w") as file:
        file.write(f"{amount}\n")


rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 0
n = 0
while rounds == 0 or n < rounds:
    with ckpt.uninterrupted():
        life = ckpt.restored()
        put("first", n)
        time.sleep(0.02)
        put("second", -n)
        if ckpt.restored() != life:
            sys.exit("saved in the middle")
    print("round", n, flush=True)
    n += 1
