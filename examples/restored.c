/* Does something when it has come out of an image: ckpt_restored().
 *
 *     ckpt api c > ckpt.h && cc -o restored restored.c
 *     ckpt --backend preload run -- ./restored
 */
#include <stdio.h>
#include <unistd.h>

#include "ckpt.h"

int main(void)
{
	int life = -1;

	puts(ckpt_available() ? "under ckpt" : "not under ckpt");
	for (;;) {
		int now = ckpt_restored();

		if (now < 0) {
			perror("restored");
			return 0;
		}
		if (now != life) {
			life = now;
			printf("life %d\n", life);
			fflush(stdout);
		}
		usleep(1000);
	}
}
