/* The first serial port of a PC, polled. */
#pragma once

void serial_init(void);
void serial_write(const char *text, unsigned length);
