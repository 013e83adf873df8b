/* Two ranks of MPI that pass each other messages, small and large, and add up together. Each looks at all that comes. */
#include "checkpoint.h"
#include <mpi.h>

enum { LARGE = 30000 };

static long values[LARGE], theirs[LARGE];

static void exchange(int rank, long round, int length) {
    int other = 1 - rank;
    for (int n = 0; n < length; n++)
        values[n] = round * 31 + rank * 1000003 + n;
    CHECK(MPI_Sendrecv(values, length, MPI_LONG, other, 7, theirs, length, MPI_LONG, other, 7, MPI_COMM_WORLD,
                       MPI_STATUS_IGNORE) == MPI_SUCCESS);
    for (int n = 0; n < length; n++)
        CHECK(theirs[n] == round * 31 + other * 1000003 + n);
}

int main(int count, char **arguments) {
    int rank, ranks;
    long over = 0, round = 0;
    CHECK(MPI_Init(&count, &arguments) == MPI_SUCCESS);
    CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &rank) == MPI_SUCCESS && MPI_Comm_size(MPI_COMM_WORLD, &ranks) == MPI_SUCCESS);
    CHECK(ranks == 2);
    while (!over) {
        long sum = 0, mine = round * (rank + 1);
        exchange(rank, round, 10);
        exchange(rank, round, LARGE);
        CHECK(MPI_Allreduce(&mine, &sum, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD) == MPI_SUCCESS && sum == round * 3);
        if (rank == 0)
            over = is_go();
        CHECK(MPI_Bcast(&over, 1, MPI_LONG, 0, MPI_COMM_WORLD) == MPI_SUCCESS);
        if (++round == 30 && rank == 0)
            ready();
    }
    CHECK(MPI_Barrier(MPI_COMM_WORLD) == MPI_SUCCESS);
    CHECK(MPI_Finalize() == MPI_SUCCESS);
    return rank == 0 ? pass() : 0;
}
