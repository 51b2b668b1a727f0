/*
 * The part of the PKCS#11 2.40 ABI that this package calls by itself, because
 * a secret passes through it: types as the standard lays them out on Unix, and
 * the function list, whose order is fixed for ever.
 */
#ifndef KMSFS_CRYPTOKI_H
#define KMSFS_CRYPTOKI_H

typedef unsigned long ck_ulong;
typedef unsigned char ck_byte;

typedef struct {
	ck_ulong type;
	void *value;
	ck_ulong len;
} ck_attribute;

typedef struct {
	ck_ulong mechanism;
	void *parameter;
	ck_ulong len;
} ck_mechanism;

typedef struct {
	void *create_mutex, *destroy_mutex, *lock_mutex, *unlock_mutex;
	ck_ulong flags;
	void *reserved;
	void *nss_reserved; /* NSS has one field more */
} ck_initialize_args;

/* Positions in the list of functions. */
enum {
	CK_INITIALIZE = 0,
	CK_LOGIN = 18,
	CK_CREATE_OBJECT = 20,
	CK_GET_ATTRIBUTE_VALUE = 24,
	CK_ENCRYPT = 30,
	CK_DECRYPT = 34,
	CK_FUNCTIONS = 68
};

typedef struct {
	ck_byte major, minor;
	void (*function[CK_FUNCTIONS])(void);
} ck_function_list;

#endif
