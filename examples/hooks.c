/* Closes a connection before each checkpoint and opens it again afterwards: ckpt_hooks_add().
 *
 * A connection that leads out of the job cannot be saved; without the hooks every dump would be refused.
 *
 *     ckpt api c > ckpt.h && cc -pthread -o hooks hooks.c
 *     ckpt --backend preload run -- ./hooks SOCKET         a Unix stream socket that somebody listens at
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "ckpt.h"

static const char *path;
static int connection = -1;
/* Held from `before` to `after`: meanwhile nobody uses the connection. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void open_connection(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	connection = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof(address))) {
		perror(path);
		exit(2);
	}
}

static int before(void *argument)
{
	(void)argument;
	pthread_mutex_lock(&lock);
	close(connection);
	connection = -1;
	return 0;
}

static void after(int outcome, void *argument)
{
	static const char *const names[] = { "failed", "saved", "restored" };

	(void)argument;
	open_connection();
	dprintf(connection, "again: %s\n", names[outcome + 1]);
	pthread_mutex_unlock(&lock);
}

int main(int count, char **arguments)
{
	if (count != 2)
		return 2;
	path = arguments[1];
	open_connection();
	if (ckpt_hooks_add(before, after, NULL))
		perror("without hooks");
	for (long n = 0;; n++) {
		pthread_mutex_lock(&lock);
		if (dprintf(connection, "%ld\n", n) < 0)
			return 1;
		pthread_mutex_unlock(&lock);
		usleep(10000);
	}
}
