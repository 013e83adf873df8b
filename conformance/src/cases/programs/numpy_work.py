# Matrices that are multiplied by all threads of the library, again and again, with an answer that is known.
import os

import numpy

random = numpy.random.default_rng(7)
size = 300
# A rotation of the rows: after size of them everything is where it was.
turn = numpy.roll(numpy.eye(size), 1, axis=0)
start = random.integers(0, 1000, (size, size)).astype(float)
current, turns = start, 0
while not os.path.exists('go'):
    current = turn @ current
    turns += 1
    if turns == 10:
        open('ready', 'w').close()
with open('verdict', 'w') as verdict:
    right = numpy.array_equal(current, numpy.roll(start, turns % size, axis=0))
    draws = numpy.random.default_rng(7)
    draws.integers(0, 1000, (size, size))
    right = right and numpy.array_equal(random.random(100), draws.random(100))
    verdict.write('pass' if right else f'wrong after {turns} turns')
