/*
 * ckpt.h: what a program may ask of ckpt. `ckpt api c > ckpt.h` writes it.
 *
 * There is nothing to link. A program that was started by `ckpt run --backend preload` finds the functions in itself; in
 * any other they return -1 with errno ENOTSUP, and harm nothing. An error is always -1 with errno.
 *
 * Including this header makes the program one that is asked before each dump, with whichever backend that is made. Needs
 * glibc 2.34 or later, or -ldl.
 *
 * License: MIT OR Apache-2.0
 */
#ifndef CKPT_H
#define CKPT_H

#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How a checkpoint has ended for this process, as its hooks learn it. */
enum ckpt_outcome {
	CKPT_FAILED = -1, /* there is no image, and the program goes on */
	CKPT_SAVED = 0,	  /* there is an image, and the program goes on */
	CKPT_RESTORED = 1 /* this process has come out of the image */
};

typedef int ckpt_before(void *argument);
typedef void ckpt_after(int outcome, void *argument);

/* The shim's side. Not to be used but through the functions below. */
struct ckpt_interface_v1 {
	uint32_t version;
	uint32_t size;
	int (*attach)(void);
	int (*restored)(void);
	int (*enter)(void);
	int (*leave)(void);
	int (*now)(const char *image);
	int (*add)(ckpt_before *before, ckpt_after *after, void *argument);
	int (*remove)(ckpt_before *before, ckpt_after *after, void *argument);
};

/* Found before main(), as looking up a name is not safe in a signal handler. */
static const struct ckpt_interface_v1 *ckpt_interface;

__attribute__((constructor, used)) static void ckpt_find_interface(void)
{
	ckpt_interface = (const struct ckpt_interface_v1 *)dlsym((void *)0, "ckpt_interface_v1");
	if (ckpt_interface)
		ckpt_interface->attach();
}

#define CKPT_ASK(function, arguments)                                                                                  \
	int result = ckpt_interface ? ckpt_interface->function arguments : -ENOTSUP;                                   \
	if (result >= 0)                                                                                               \
		return result;                                                                                         \
	errno = -result;                                                                                               \
	return -1

/* 1 if ckpt can save this program and hears it, else 0. */
__attribute__((unused)) static int ckpt_available(void)
{
	return ckpt_interface != 0;
}

/*
 * How many times this process has come out of an image: 0 in its first life. A child of fork() inherits the number.
 * Safe in signal handlers.
 */
__attribute__((unused)) static int ckpt_restored(void)
{
	CKPT_ASK(restored, ());
}

/*
 * Begins a region in which no checkpoint happens. Regions belong to the process, whichever thread enters and leaves them,
 * and nest: a dump waits until each was left, for as long as its --timeout says. If a checkpoint has begun, this waits for
 * its end; so do not enter one while you hold a lock that a hook takes. A child of fork() inherits the regions that its
 * parent is in. Safe in signal handlers.
 */
__attribute__((unused)) static int ckpt_region_enter(void)
{
	CKPT_ASK(enter, ());
}

/* Ends one. EINVAL: there is none. Safe in signal handlers. */
__attribute__((unused)) static int ckpt_region_leave(void)
{
	CKPT_ASK(leave, ());
}

/*
 * Has the whole tree of the job saved, and waits for it: 0 when it was saved and goes on, 1 in a process that has come out
 * of an image meanwhile. `image` is a directory that ckpt makes, as of `ckpt dump -D`; NULL is the next one of the job's
 * own (`ckpt run -D`).
 *
 * It is the ckpt which waits for the job that does it: `ckpt run`, or `ckpt restore` without --detach.
 * ENOTCONN: there is none. ECONNRESET: it has ended in the middle. EDESTADDRREQ: it has no directory of its own. EINVAL: no
 * image can be made at that name: it is taken, say, or the directory that it is to be in is not there.
 * EBUSY: the programs of the job did not agree in time. ENOTSUP: something of the job cannot be saved. ECANCELED: the dump
 * was given up. EPERM: only a job of its own user's gets images by name. EDEADLK: called by a hook. Otherwise as the file
 * system says. ckpt says the reason in full on its standard error.
 *
 * Not from within a region, which would wait for itself until the time is over.
 */
__attribute__((unused)) static int ckpt_now(const char *image)
{
	CKPT_ASK(now, (image));
}

/*
 * Adds a pair of hooks; either may be NULL. They run around each checkpoint, while nobody is in a region and while the
 * other threads run: `before` from the pair that was added last to the first, `after` from the first to the last. What
 * `before` returns, if not 0, refuses: then the dump fails, and `after` of those that have run gets CKPT_FAILED, as it does
 * when the dump fails otherwise or ckpt is killed. Hooks that do not return make the dump fail when its --timeout is over.
 *
 * All run in one thread, which is made for the first pair and in which signals of the program are blocked. So a mutex that
 * `before` takes may be released by `after`. A child of fork() has no hooks: it adds its own.
 * ENOSPC: there are 64 already. EAGAIN: there can be no thread.
 */
__attribute__((unused)) static int ckpt_hooks_add(ckpt_before *before, ckpt_after *after, void *argument)
{
	CKPT_ASK(add, (before, after, argument));
}

/* Removes a pair. When it returns, neither runs any more. EINVAL: it was not added. */
__attribute__((unused)) static int ckpt_hooks_remove(ckpt_before *before, ckpt_after *after, void *argument)
{
	CKPT_ASK(remove, (before, after, argument));
}

#undef CKPT_ASK

#ifdef __cplusplus
}
#endif

#endif
