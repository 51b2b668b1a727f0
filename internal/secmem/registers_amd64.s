//go:build !purego

#include "textflag.h"

// Vector and mask registers are scratch in Go's ABI0; the wrapper that Go code
// calls these through restores the zero that X15 must hold, which it does anyway.

// func clearSSE()
TEXT ·clearSSE(SB), NOSPLIT|NOFRAME, $0-0
	PXOR X0, X0
	PXOR X1, X1
	PXOR X2, X2
	PXOR X3, X3
	PXOR X4, X4
	PXOR X5, X5
	PXOR X6, X6
	PXOR X7, X7
	PXOR X8, X8
	PXOR X9, X9
	PXOR X10, X10
	PXOR X11, X11
	PXOR X12, X12
	PXOR X13, X13
	PXOR X14, X14
	PXOR X15, X15
	RET

// func clearAVX()
TEXT ·clearAVX(SB), NOSPLIT|NOFRAME, $0-0
	VZEROALL
	RET

// VZEROALL reaches registers 0 to 15 in their whole width, but not 16 to 31.
//
// func clearAVX512()
TEXT ·clearAVX512(SB), NOSPLIT|NOFRAME, $0-0
	VZEROALL
	VPXORQ Z16, Z16, Z16
	VPXORQ Z17, Z17, Z17
	VPXORQ Z18, Z18, Z18
	VPXORQ Z19, Z19, Z19
	VPXORQ Z20, Z20, Z20
	VPXORQ Z21, Z21, Z21
	VPXORQ Z22, Z22, Z22
	VPXORQ Z23, Z23, Z23
	VPXORQ Z24, Z24, Z24
	VPXORQ Z25, Z25, Z25
	VPXORQ Z26, Z26, Z26
	VPXORQ Z27, Z27, Z27
	VPXORQ Z28, Z28, Z28
	VPXORQ Z29, Z29, Z29
	VPXORQ Z30, Z30, Z30
	VPXORQ Z31, Z31, Z31
	KXORW K0, K0, K0
	KXORW K1, K1, K1
	KXORW K2, K2, K2
	KXORW K3, K3, K3
	KXORW K4, K4, K4
	KXORW K5, K5, K5
	KXORW K6, K6, K6
	KXORW K7, K7, K7
	RET
