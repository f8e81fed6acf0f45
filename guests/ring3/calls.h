/* What the user program may ask the kernel for: number in RAX, arguments in RDI and RSI, result in
 * RAX, as on Linux; the same numbers through both doors. */
#pragma once

/* Linux's choice for 32-bit programs; any vector will do whose gate has DPL 3. */
#define INT_CALL_VECTOR 0x80

#define CALL_ADD 1    /* returns the sum of the arguments */
#define CALL_EXIT 2   /* end the guest with this status */
#define CALL_FORGED 3 /* never made by SYSCALL: who arrives with it has forged a call */
