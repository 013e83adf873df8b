"""Closes a connection before each checkpoint and opens it again afterwards: ckpt.before, ckpt.after.

A connection that leads out of the job cannot be saved; without the hooks every dump would be refused.

    ckpt api python > ckpt.py
    ckpt --backend preload run -- python3 hooks.py SOCKET       a Unix stream socket that somebody listens at
"""

import itertools
import socket
import sys
import threading
import time

import ckpt

path = sys.argv[1]
connection = None
# Held from `before` to `after`, which run in one thread: meanwhile nobody uses the connection.
lock = threading.Lock()


def open_connection():
    global connection
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)


@ckpt.before
def close_connection():
    lock.acquire()
    connection.close()


@ckpt.after
def connect_again(outcome):
    open_connection()
    name = {ckpt.SAVED: "saved", ckpt.RESTORED: "restored", ckpt.FAILED: "failed"}[outcome]
    connection.sendall(f"again: {name}\n".encode())
    lock.release()


open_connection()
for n in itertools.count():
    with lock:
        connection.sendall(f"{n}\n".encode())
    time.sleep(0.01)
