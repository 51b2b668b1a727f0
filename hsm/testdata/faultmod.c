/*
 * A PKCS#11 module for tests: it forwards to a real one, and on demand does what
 * no real one will do when asked: crash, hang, return any CKR, or be odd in ways
 * that some vendor's module is.
 *
 * FAULT_MODULE names the real module, FAULT_DIR a directory of orders, read anew
 * at each call:
 *
 *   once-C_Name    carried out by one call, which renames it to once-C_Name.taken
 *   always-C_Name  carried out by every call
 *   poison         "HEX action": carried out when the input of C_Decrypt begins so
 *
 * Actions: segv, abort, exit, kill, hang (until the order is removed), garbage
 * (CKR_OK and wrong data), slow, toomuch (claims more output than there was room), spam
 * (a lot on stderr, then goes on), rv=HEX.
 *
 *   tokenflags     HEX to or into CK_TOKEN_INFO.flags
 *   maxsessions    how many sessions there are
 *   gcm            "param" or "appended": who makes the IV
 *   odd            labels padded with zeros, objects found one at a time, and each
 *                  C_GetFunctionList is for another instance, to be initialised alone
 *   noinfo         C_GetTokenInfo fails after a login
 *   cantlock       C_Initialize refuses locking; two calls at once abort
 *
 * Every call of a hooked function appends a byte to calls-C_Name; calls that obey
 * an order append one to obeyed-C_Name. C_Initialize writes environment and args.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cryptoki.h"

extern char **environ;

enum { OK = 0, SESSION_COUNT = 0xB1, CANT_LOCK = 0x0A, GENERAL_ERROR = 5, NOT_INITIALIZED = 0x190, CKM_AES_GCM = 0x1087, WAIT = 2000 };

static ck_function_list ours, *real;
static int sessions, logged_in, no_lock, inside;

static const char *in_dir(const char *format, ...) {
	static __thread char path[4096];
	char name[512];
	va_list args;
	va_start(args, format);
	vsnprintf(name, sizeof name, format, args);
	va_end(args);
	snprintf(path, sizeof path, "%s/%s", getenv("FAULT_DIR"), name);
	return path;
}

static int read_order(const char *path, char *text, size_t room) {
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t n = read(fd, text, room - 1);
	close(fd);
	if (n < 0)
		n = 0;
	text[n] = 0;
	text[strcspn(text, "\n")] = 0;
	return 1;
}

static void count(const char *what, const char *name) {
	int fd = open(in_dir("%s-%s", what, name), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (fd >= 0) {
		if (write(fd, ".", 1) != 1)
			abort();
		close(fd);
	}
}

/* obey carries out an action. It returns 0 to go on, 1 to return *rv, 2 and 3 for
 * garbage and toomuch. */
static int obey(const char *name, const char *action, const char *path, ck_ulong *rv) {
	count("obeyed", name);
	if (!strcmp(action, "segv"))
		*(volatile int *)0 = 1;
	if (!strcmp(action, "abort"))
		abort();
	if (!strcmp(action, "exit"))
		_exit(0);
	if (!strcmp(action, "kill"))
		kill(getpid(), SIGKILL);
	if (!strcmp(action, "hang"))
		while (access(path, F_OK) == 0)
			usleep(WAIT);
	if (!strcmp(action, "slow"))
		usleep(10 * WAIT);
	if (!strcmp(action, "spam"))
		for (int i = 0; i < 5000; i++)
			fprintf(stderr, "module says %d times the same thing, and %0600d\n", i, i);
	if (!strcmp(action, "garbage"))
		return 2;
	if (!strcmp(action, "toomuch"))
		return 3;
	if (!strncmp(action, "rv=", 3)) {
		*rv = strtoul(action + 3, NULL, 16);
		return 1;
	}
	return 0;
}

static int order(const char *name, ck_ulong *rv) {
	char action[128], taken[4096], path[4096];
	count("calls", name);
	snprintf(taken, sizeof taken, "%s", in_dir("once-%s.taken", name));
	if (rename(in_dir("once-%s", name), taken) == 0 && read_order(taken, action, sizeof action))
		return obey(name, action, taken, rv);
	snprintf(path, sizeof path, "%s", in_dir("always-%s", name));
	if (read_order(path, action, sizeof action))
		return obey(name, action, path, rv);
	return 0;
}

static int poisoned(const unsigned char *in, ck_ulong len, ck_ulong *rv) {
	char text[256], hex[3] = {0}, path[4096];
	snprintf(path, sizeof path, "%s", in_dir("poison"));
	if (!read_order(path, text, sizeof text))
		return 0;
	char *action = strchr(text, ' ');
	if (action == NULL)
		abort();
	*action++ = 0;
	for (size_t i = 0; i < strlen(text) / 2; i++) {
		memcpy(hex, text + 2 * i, 2);
		if (i >= len || in[i] != strtoul(hex, NULL, 16))
			return 0;
	}
	return obey("poison", action, path, rv);
}

#define REAL(type, index) ((type)real->function[index])

static void enter(void) {
	if (no_lock && __sync_fetch_and_add(&inside, 1) != 0)
		abort();
}

static void leave(void) {
	if (no_lock)
		__sync_fetch_and_sub(&inside, 1);
}

static ck_ulong fault_initialize(ck_initialize_args *args) {
	char text[64];
	ck_ulong rv = OK;
	FILE *f = fopen(in_dir("environment"), "w");
	for (char **e = environ; f != NULL && *e != NULL; e++)
		fprintf(f, "%s\n", *e);
	if (f != NULL)
		fclose(f);
	if (args != NULL && args->reserved != NULL && (f = fopen(in_dir("args"), "w")) != NULL) {
		fputs(args->reserved, f);
		fclose(f);
	}
	if (order("C_Initialize", &rv) == 1)
		return rv;
	if (read_order(in_dir("cantlock"), text, sizeof text)) {
		if (args != NULL && args->flags != 0)
			return CANT_LOCK;
		no_lock = 1;
	}
	sessions = logged_in = 0;
	ck_initialize_args forward = {0}; /* without them SoftHSM would not lock either */
	forward.flags = 2;                /* CKF_OS_LOCKING_OK */
	return REAL(ck_ulong (*)(void *), 0)(no_lock ? NULL : &forward);
}

static ck_ulong fault_token_info(ck_ulong slot, unsigned char *info) {
	char text[64];
	ck_ulong rv = OK;
	if (order("C_GetTokenInfo", &rv) == 1)
		return rv;
	if (logged_in && access(in_dir("noinfo"), F_OK) == 0)
		return GENERAL_ERROR;
	rv = REAL(ck_ulong (*)(ck_ulong, void *), 6)(slot, info);
	if (read_order(in_dir("tokenflags"), text, sizeof text))
		*(ck_ulong *)(info + 96) |= strtoul(text, NULL, 16);
	if (access(in_dir("odd"), F_OK) == 0)
		for (int i = 31; i > 0 && info[i] == ' '; i--)
			info[i] = 0;
	return rv;
}

static ck_ulong fault_open_session(ck_ulong slot, ck_ulong flags, void *app, void *notify, ck_ulong *session) {
	char text[64];
	ck_ulong rv = OK;
	if (order("C_OpenSession", &rv) == 1)
		return rv;
	int n = __sync_add_and_fetch(&sessions, 1);
	if (read_order(in_dir("maxsessions"), text, sizeof text) && n > atoi(text))
		rv = SESSION_COUNT;
	else
		rv = REAL(ck_ulong (*)(ck_ulong, ck_ulong, void *, void *, ck_ulong *), 12)(slot, flags, app, notify, session);
	if (rv != OK)
		__sync_sub_and_fetch(&sessions, 1);
	return rv;
}

static ck_ulong fault_close_session(ck_ulong session) {
	__sync_sub_and_fetch(&sessions, 1);
	return REAL(ck_ulong (*)(ck_ulong), 13)(session);
}

static ck_ulong fault_login(ck_ulong session, ck_ulong user, void *pin, ck_ulong len) {
	ck_ulong rv = OK;
	if (order("C_Login", &rv) == 1)
		return rv;
	rv = REAL(ck_ulong (*)(ck_ulong, ck_ulong, void *, ck_ulong), 18)(session, user, pin, len);
	logged_in = rv == OK;
	return rv;
}

static ck_ulong fault_find(ck_ulong session, ck_ulong *objects, ck_ulong max, ck_ulong *found) {
	ck_ulong rv = OK;
	if (order("C_FindObjects", &rv) == 1)
		return rv;
	if (max > 1 && access(in_dir("odd"), F_OK) == 0)
		max = 1;
	return REAL(ck_ulong (*)(ck_ulong, ck_ulong *, ck_ulong, ck_ulong *), 27)(session, objects, max, found);
}

/* CK_GCM_PARAMS of PKCS#11 2.40 */
typedef struct {
	unsigned char *iv;
	ck_ulong iv_len, iv_bits;
	unsigned char *aad;
	ck_ulong aad_len, tag_bits;
} gcm_params;

static __thread unsigned char appended[16];
static __thread int append;

static ck_ulong fault_encrypt_init(ck_ulong session, ck_mechanism *m, ck_ulong key) {
	char text[64];
	ck_ulong rv = OK;
	gcm_params own;
	ck_mechanism with = *m;
	if (order("C_EncryptInit", &rv) == 1)
		return rv;
	append = 0;
	if (m->mechanism == CKM_AES_GCM && read_order(in_dir("gcm"), text, sizeof text)) {
		gcm_params *theirs = m->parameter;
		for (ck_ulong i = 0; i < theirs->iv_len; i++)
			if (theirs->iv[i] != 0)
				return 0x71; /* CKR_MECHANISM_PARAM_INVALID: the IV is ours to make */
		if (!strcmp(text, "param")) {
			if (getrandom(theirs->iv, theirs->iv_len, 0) < 0)
				abort();
		} else {
			if (getrandom(appended, sizeof appended, 0) < 0)
				abort();
			own = *theirs;
			own.iv = appended;
			own.iv_len = sizeof appended;
			own.iv_bits = 8 * sizeof appended;
			with.parameter = &own;
			append = 1;
		}
	}
	return REAL(ck_ulong (*)(ck_ulong, ck_mechanism *, ck_ulong), 29)(session, &with, key);
}

static ck_ulong fault_encrypt(ck_ulong session, void *in, ck_ulong len, unsigned char *out, ck_ulong *room) {
	ck_ulong rv = OK;
	if (order("C_Encrypt", &rv) == 1)
		return rv;
	rv = REAL(ck_ulong (*)(ck_ulong, void *, ck_ulong, void *, ck_ulong *), 30)(session, in, len, out, room);
	if (rv == OK && append && out != NULL) {
		memcpy(out + *room, appended, sizeof appended);
		*room += sizeof appended;
	}
	return rv;
}

static ck_ulong fault_decrypt(ck_ulong session, unsigned char *in, ck_ulong len, unsigned char *out, ck_ulong *room) {
	ck_ulong rv = OK;
	enter();
	int what = poisoned(in, len, &rv);
	if (what == 0)
		what = order("C_Decrypt", &rv);
	if (what != 1) {
		ck_ulong had = *room;
		rv = REAL(ck_ulong (*)(ck_ulong, void *, ck_ulong, void *, ck_ulong *), 34)(session, in, len, out, room);
		if (what == 2 && rv == OK)
			memset(out, 'x', *room);
		if (what == 3)
			*room = had + 4096;
	}
	leave();
	return rv;
}

static ck_ulong fault_unwrap(ck_ulong session, ck_mechanism *m, ck_ulong key, void *in, ck_ulong len, void *template, ck_ulong n, ck_ulong *object) {
	ck_ulong rv = OK;
	if (order("C_UnwrapKey", &rv) == 1)
		return rv;
	return REAL(ck_ulong (*)(ck_ulong, ck_mechanism *, ck_ulong, void *, ck_ulong, void *, ck_ulong, ck_ulong *), 61)(session, m, key, in, len, template, n, object);
}

static ck_ulong fault_decrypt_init(ck_ulong session, ck_mechanism *m, ck_ulong key) {
	ck_ulong rv = OK;
	if (order("C_DecryptInit", &rv) == 1)
		return rv;
	return REAL(ck_ulong (*)(ck_ulong, ck_mechanism *, ck_ulong), 33)(session, m, key);
}

static ck_ulong fault_list(ck_function_list **list) {
	*list = &ours;
	return OK;
}

static ck_ulong not_initialized(void) {
	return NOT_INITIALIZED;
}

ck_ulong C_GetFunctionList(ck_function_list **list) {
	if (real != NULL && access(in_dir("odd"), F_OK) == 0) {
		ck_function_list *other = calloc(1, sizeof *other);
		for (size_t i = 0; i < sizeof other->function / sizeof other->function[0]; i++)
			other->function[i] = (void (*)(void))not_initialized;
		*list = other;
		return OK;
	}
	void *handle = dlopen(getenv("FAULT_MODULE"), RTLD_NOW);
	if (handle == NULL) {
		fprintf(stderr, "%s\n", dlerror());
		return GENERAL_ERROR;
	}
	ck_ulong (*get)(ck_function_list **) = (ck_ulong (*)(ck_function_list **))dlsym(handle, "C_GetFunctionList");
	if (get(&real) != OK)
		return GENERAL_ERROR;
	ours = *real;
#define HOOK(index, f) ours.function[index] = (void (*)(void))f
	HOOK(0, fault_initialize);
	HOOK(3, fault_list);
	HOOK(6, fault_token_info);
	HOOK(12, fault_open_session);
	HOOK(13, fault_close_session);
	HOOK(18, fault_login);
	HOOK(27, fault_find);
	HOOK(29, fault_encrypt_init);
	HOOK(30, fault_encrypt);
	HOOK(33, fault_decrypt_init);
	HOOK(34, fault_decrypt);
	HOOK(61, fault_unwrap);
	*list = &ours;
	return OK;
}
