/* Has itself saved in the middle of its work: ckpt_now().
 *
 *     ckpt api c > ckpt.h && cc -o now now.c
 *     ckpt --backend preload run -D saved -- ./now         saved/1, or where the argument says
 *     ckpt restore -D saved/latest                         goes on from the middle
 */
#include <stdio.h>
#include <string.h>

#include "ckpt.h"

int main(int count, char **arguments)
{
	long sum = 0;

	for (int n = 1; n <= 1000; n++) {
		sum += n;
		if (n != 500)
			continue;
		switch (ckpt_now(count > 1 ? arguments[1] : NULL)) {
		case 0:
			puts("saved");
			break;
		case 1:
			puts("restored");
			break;
		default:
			printf("not saved: %s\n", strerror(errno));
		}
		fflush(stdout);
	}
	printf("sum %ld\n", sum);
	return 0;
}
