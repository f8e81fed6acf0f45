"""Offsets of the virtio-mmio registers (virtio 1.2, 4.2.2, table 4.1), and the bits of Status (2.1)."""

from __future__ import annotations

from pyvmm.registers import Bit, Register, RegisterTable

MAGIC_VALUE, VERSION_REGISTER, DEVICE_ID, VENDOR_ID = 0x00, 0x04, 0x08, 0x0C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x10, 0x14
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x20, 0x24
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM = 0x30, 0x34, 0x38
QUEUE_READY, QUEUE_NOTIFY = 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACK = 0x60, 0x64
STATUS = 0x70
QUEUE_DESC_LOW, QUEUE_DESC_HIGH = 0x80, 0x84
QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH = 0x90, 0x94
QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH = 0xA0, 0xA4
SHM_SEL, SHM_LEN_LOW, SHM_BASE_HIGH = 0xAC, 0xB0, 0xBC
CONFIG_GENERATION = 0xFC
CONFIG = 0x100

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
DEVICE_NEEDS_RESET, FAILED = 64, 128
STATUS_ORDER = (ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK)
"""3.1.1: the bits that a driver sets, one after the other."""

STATUS_BITS = (
    Bit(ACKNOWLEDGE, "ACKNOWLEDGE", "the guest has seen the device"), Bit(DRIVER, "DRIVER", "it has a driver for it"),
    Bit(FEATURES_OK, "FEATURES_OK", "features are agreed"), Bit(DRIVER_OK, "DRIVER_OK", "the driver is ready"),
    Bit(DEVICE_NEEDS_RESET, "DEVICE_NEEDS_RESET"), Bit(FAILED, "FAILED", "the driver gave up"),
)  # fmt: skip
_INTERRUPTS = (Bit(1, "USED_BUFFER", "a queue has used buffers"), Bit(2, "CONFIGURATION", "the configuration changed"))


def _pair(low: int, name: str, text: str) -> tuple[Register, Register]:
    return (
        Register(low, f"{name}Low", f"{text}: low half", size=4, access="w"),
        Register(low + 4, f"{name}High", f"{text}: high half", size=4, access="w"),
    )


TABLE = RegisterTable("virtio-mmio", (
    Register(MAGIC_VALUE, "MagicValue", '"virt"', size=4, access="r"),
    Register(VERSION_REGISTER, "Version", "2", size=4, access="r"),
    Register(DEVICE_ID, "DeviceID", "what it is", size=4, access="r", values={
        0: "nothing", 1: "network card", 2: "disk", 3: "console", 4: "entropy", 5: "balloon", 19: "vsock"}),
    Register(VENDOR_ID, "VendorID", "who made it", size=4, access="r"),
    Register(DEVICE_FEATURES, "DeviceFeatures", "32 of the features it offers", size=4, access="r"),
    Register(DEVICE_FEATURES_SEL, "DeviceFeaturesSel", "which 32", size=4, access="w"),
    Register(DRIVER_FEATURES, "DriverFeatures", "32 of the features the driver takes", size=4, access="w"),
    Register(DRIVER_FEATURES_SEL, "DriverFeaturesSel", "which 32", size=4, access="w"),
    Register(QUEUE_SEL, "QueueSel", "the queue that is meant", size=4, access="w"),
    Register(QUEUE_NUM_MAX, "QueueNumMax", "how large it may be", size=4, access="r"),
    Register(QUEUE_NUM, "QueueNum", "how large it is", size=4, access="w"),
    Register(QUEUE_READY, "QueueReady", "whether it is in use", size=4),
    Register(QUEUE_NOTIFY, "QueueNotify", "doorbell: this queue has buffers", size=4, access="w"),
    Register(INTERRUPT_STATUS, "InterruptStatus", "why it interrupted", size=4, access="r", bits=_INTERRUPTS),
    Register(INTERRUPT_ACK, "InterruptACK", "what was dealt with", size=4, access="w", bits=_INTERRUPTS),
    Register(STATUS, "Status", "how far the driver is; 0 resets the device", size=4, bits=STATUS_BITS,
             values={0: "reset"}),
    *_pair(QUEUE_DESC_LOW, "QueueDesc", "address of the descriptors"),
    *_pair(QUEUE_DRIVER_LOW, "QueueDriver", "address of the available ring"),
    *_pair(QUEUE_DEVICE_LOW, "QueueDevice", "address of the used ring"),
    Register(SHM_SEL, "SHMSel", "the shared memory that is meant", size=4, access="w"),
    Register(CONFIG_GENERATION, "ConfigGeneration", "changes with the configuration", size=4, access="r"),
    Register(CONFIG, "Config", "the device's own configuration", size=0xF00),
))  # fmt: skip
