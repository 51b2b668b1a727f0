//go:build cgo

package worker

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include "cryptoki.h"

static const ck_ulong not_supported = 0x54; // CKR_FUNCTION_NOT_SUPPORTED

static ck_ulong initialize(ck_function_list *l, ck_ulong flags, char *reserved) {
	ck_ulong (*f)(void *) = (ck_ulong (*)(void *))l->function[CK_INITIALIZE];
	ck_initialize_args args;
	memset(&args, 0, sizeof args);
	args.flags = flags;
	args.reserved = reserved;
	return f(&args);
}

static ck_ulong login(ck_function_list *l, ck_ulong session, void *pin, ck_ulong len) {
	ck_ulong (*f)(ck_ulong, ck_ulong, void *, ck_ulong) = (ck_ulong (*)(ck_ulong, ck_ulong, void *, ck_ulong))l->function[CK_LOGIN];
	if (f == NULL)
		return not_supported;
	return f(session, 1, pin, len); // CKU_USER
}

typedef ck_ulong (*one_part)(ck_ulong, void *, ck_ulong, void *, ck_ulong *);

static ck_ulong crypt(ck_function_list *l, int which, ck_ulong session, void *in, ck_ulong len, void *out, ck_ulong *room) {
	one_part f = (one_part)l->function[which];
	if (f == NULL)
		return not_supported;
	return f(session, in, len, out, room);
}

static ck_ulong attribute_value(ck_function_list *l, ck_ulong session, ck_ulong object, ck_ulong type, void *out, ck_ulong *room) {
	ck_ulong (*f)(ck_ulong, ck_ulong, ck_attribute *, ck_ulong) = (ck_ulong (*)(ck_ulong, ck_ulong, ck_attribute *, ck_ulong))l->function[CK_GET_ATTRIBUTE_VALUE];
	ck_attribute a = {type, out, *room};
	if (f == NULL)
		return not_supported;
	ck_ulong rv = f(session, object, &a, 1);
	*room = a.len;
	return rv;
}

// create_secret makes a session object of CKK_GENERIC_SECRET that may be wrapped.
static ck_ulong create_secret(ck_function_list *l, ck_ulong session, void *value, ck_ulong len, ck_ulong *object) {
	ck_ulong (*f)(ck_ulong, ck_attribute *, ck_ulong, ck_ulong *) = (ck_ulong (*)(ck_ulong, ck_attribute *, ck_ulong, ck_ulong *))l->function[CK_CREATE_OBJECT];
	ck_ulong class = 4, key_type = 0x10; // CKO_SECRET_KEY, CKK_GENERIC_SECRET
	ck_byte yes = 1, no = 0;
	ck_attribute a[] = {
		{0x000, &class, sizeof class},       // CKA_CLASS
		{0x100, &key_type, sizeof key_type}, // CKA_KEY_TYPE
		{0x001, &no, 1},                     // CKA_TOKEN
		{0x162, &yes, 1},                    // CKA_EXTRACTABLE
		{0x103, &no, 1},                     // CKA_SENSITIVE
		{0x011, value, len},                 // CKA_VALUE
	};
	if (f == NULL)
		return not_supported;
	return f(session, a, sizeof a / sizeof a[0], object);
}
*/
import "C"

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// A library is a loaded module. Calls through which a secret passes are made
// here, from and to locked memory; all others by the embedded Ctx, which copies.
type library struct {
	*pkcs11.Ctx
	list *C.ck_function_list
	args *C.char
}

// load opens a module and does not yet initialise it.
func load(path, args string) (*library, error) {
	if _, err := os.Stat(path); err != nil { // dlopen(3) says it less clearly
		return nil, err
	}
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	if C.dlopen(name, C.RTLD_NOW) == nil { // Ctx would not say why
		return nil, fmt.Errorf("load %s: %s", path, C.GoString(C.dlerror()))
	}
	l := &library{Ctx: pkcs11.New(path)}
	if l.Ctx == nil {
		return nil, fmt.Errorf("%s is no PKCS#11 module: it has no C_GetFunctionList", path)
	}
	if l.list = functionList(l.Ctx); l.list == nil || l.list.function[C.CK_INITIALIZE] == nil {
		return nil, fmt.Errorf("%s is no PKCS#11 module: it gave no list of functions", path)
	}
	if args != "" {
		l.args = C.CString(args) // for as long as the process lives
	}
	return l, nil
}

// functionList returns the list that ctx calls through, which ctx keeps to itself.
// Asking the module for another one will not do: those of p11-kit make an instance
// of themselves, with sessions of its own, each time they are asked.
func functionList(ctx *pkcs11.Ctx) *C.ck_function_list {
	inside := (*struct {
		ctx *struct{ handle, list unsafe.Pointer }
	})(unsafe.Pointer(ctx))
	return (*C.ck_function_list)(inside.ctx.list)
}

// initialize calls C_Initialize. It reports whether calls may be made from
// several threads at once.
func (l *library) initialize() (threads bool, err error) {
	rv := pkcs11.Error(C.initialize(l.list, pkcs11.CKF_OS_LOCKING_OK, l.args))
	if rv == pkcs11.CKR_CANT_LOCK {
		return false, failed("C_Initialize", ignoring(pkcs11.Error(C.initialize(l.list, 0, l.args)), pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED))
	}
	return true, failed("C_Initialize", ignoring(rv, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED))
}

func (l *library) login(s pkcs11.SessionHandle, pin []byte) error {
	return failed("C_Login", code(C.login(l.list, C.ck_ulong(s), pointer(pin), C.ck_ulong(len(pin)))))
}

// decrypt and encrypt make one call with all the room there is: some modules
// get the size wrong when asked for it first.
func (l *library) decrypt(s pkcs11.SessionHandle, in, out []byte) (int, error) {
	n, err := l.crypt(C.CK_DECRYPT, s, in, out)
	return n, failed("C_Decrypt", err)
}

func (l *library) encrypt(s pkcs11.SessionHandle, in, out []byte) (int, error) {
	n, err := l.crypt(C.CK_ENCRYPT, s, in, out)
	return n, failed("C_Encrypt", err)
}

func (l *library) crypt(which C.int, s pkcs11.SessionHandle, in, out []byte) (int, error) {
	room := C.ck_ulong(len(out))
	rv := C.crypt(l.list, which, C.ck_ulong(s), pointer(in), C.ck_ulong(len(in)), pointer(out), &room)
	if rv == 0 && int(room) > len(out) {
		return 0, pkcs11.Error(pkcs11.CKR_BUFFER_TOO_SMALL)
	}
	return int(room), code(rv)
}

// attribute reads one attribute, which may be secret.
func (l *library) attribute(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, kind uint, out []byte) (int, error) {
	room := C.ck_ulong(len(out))
	rv := C.attribute_value(l.list, C.ck_ulong(s), C.ck_ulong(o), C.ck_ulong(kind), pointer(out), &room)
	if rv == 0 && (int(room) > len(out) || int(room) < 0) {
		return 0, failed("C_GetAttributeValue", pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID))
	}
	return int(room), failed("C_GetAttributeValue", code(rv))
}

// createSecret makes a key of value that lives as long as the session.
func (l *library) createSecret(s pkcs11.SessionHandle, value []byte) (pkcs11.ObjectHandle, error) {
	var o C.ck_ulong
	rv := C.create_secret(l.list, C.ck_ulong(s), pointer(value), C.ck_ulong(len(value)), &o)
	return pkcs11.ObjectHandle(o), failed("C_CreateObject", code(rv))
}

func pointer(b []byte) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(b)) }

// code is the error of a return value.
func code(rv C.ck_ulong) error {
	if rv == 0 {
		return nil
	}
	return pkcs11.Error(rv)
}

func ignoring(got pkcs11.Error, harmless ...pkcs11.Error) error {
	for _, h := range append(harmless, pkcs11.CKR_OK) {
		if got == h {
			return nil
		}
	}
	return got
}

// failed says which call an error came from.
func failed(call string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", call, err)
}
