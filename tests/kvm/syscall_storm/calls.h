#pragma once
#define CALL_ADD 1
#define CALL_EXIT 2
#define CALL_FORGED 3
#define ROUNDS 2000
#define STATUS_GOOD 21
