/* Keeps checkpoints out of a piece of work: ckpt_region_enter(), ckpt_region_leave().
 *
 * It moves amounts between two accounts, each in a file of its own. Files are not part of an image: one that was made
 * between the two writes would come back to accounts that do not fit.
 *
 *     ckpt api c > ckpt.h && cc -o regions regions.c
 *     ckpt --backend preload run -- ./regions ROUNDS       0: until it is ended
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "ckpt.h"

static void set(const char *account, long amount)
{
	FILE *file = fopen(account, "w");

	if (!file || fprintf(file, "%ld\n", amount) < 0 || fclose(file))
		exit(2);
}

int main(int count, char **arguments)
{
	long rounds = count > 1 ? atol(arguments[1]) : 0;

	for (long n = 0; rounds == 0 || n < rounds; n++) {
		int life;

		ckpt_region_enter();
		life = ckpt_restored();
		set("first", n);
		usleep(20000);
		/* Within another region, as a function would have it that does not know where it is called. */
		ckpt_region_enter();
		set("second", -n);
		ckpt_region_leave();
		if (ckpt_restored() != life) {
			puts("saved in the middle");
			return 1;
		}
		ckpt_region_leave();
		printf("round %ld\n", n);
		fflush(stdout);
	}
	return 0;
}
