/* The kernel's KVM interface, plus the few names newer than Debian 12's <linux/kvm.h>. */
#ifndef PYVMM_KVM_API_H
#define PYVMM_KVM_API_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* Linux 6.8: guest_memfd. Only probed for, so the numbers are enough. */
#ifndef KVM_CAP_USER_MEMORY2
#define KVM_CAP_USER_MEMORY2 231
#endif
#ifndef KVM_CAP_GUEST_MEMFD
#define KVM_CAP_GUEST_MEMFD 234
#endif
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif

#endif
