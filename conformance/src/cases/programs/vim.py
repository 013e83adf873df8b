# An editor in a pseudoterminal, typed to by a program that has the other side; a file is half written when it is dumped.
import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time

COLUMNS = 61


def fail(text):
    with open('verdict', 'w') as verdict:
        verdict.write(text)
    sys.exit(1)


child, master = pty.fork()
if child == 0:
    os.environ.update(TERM='xterm', HOME=os.getcwd())
    os.execv('/usr/bin/vim', ['vim', '-u', 'NONE', '-N', '-n', '-i', 'NONE', 'text'])
fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack('HHHH', 20, COLUMNS, 0, 0))


def screen(until, seconds=60):
    """Reads what is drawn until a text comes."""
    end, seen = time.monotonic() + seconds, b''
    while until not in seen:
        if not select.select([master], [], [], max(0, end - time.monotonic()))[0]:
            fail(f'{until} did not come onto the screen within {seconds} s: {seen[-500:]}')
        seen += os.read(master, 4096)
    return seen


def quiet():
    """Reads what is drawn until nothing more comes."""
    while select.select([master], [], [], 0.3)[0]:
        os.read(master, 4096)


screen(b'text')
os.write(master, b'i')
for number in range(100):
    os.write(master, b'line %d\r' % number)
quiet()
open('ready', 'w').close()
while not os.path.exists('go'):
    time.sleep(0.001)
# In the middle of inserting; the width of its screen is still known, and it hears of another.
os.write(master, b'the end\x1b:put =&columns\r')
quiet()
fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack('HHHH', 20, COLUMNS + 8, 0, 0))
# It draws all anew.
screen(b'the end')
quiet()
os.write(master, b':put =&columns\r')
quiet()
os.write(master, b':wq\r')
try:
    while os.read(master, 4096):
        pass
except OSError:
    # EIO: the other side is closed.
    pass
status = os.waitpid(child, 0)[1]
if status != 0:
    fail(f'the editor ended with {status}')
expected = [f'line {number}' for number in range(100)] + ['the end', str(COLUMNS), str(COLUMNS + 8)]
with open('text') as text:
    found = text.read().splitlines()
if found != expected:
    fail(f'the text ends in {found[-5:]} instead of {expected[-5:]}')
with open('verdict', 'w') as verdict:
    verdict.write('pass')
