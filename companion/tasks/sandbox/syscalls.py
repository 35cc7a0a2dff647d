"""A filter of system calls for bubblewrap's --seccomp, in classic BPF: nothing has to be installed for it.

Refused is what programs of a benchmark never need and kernels had holes in: other processes' memory, namespaces,
mounts, keys, BPF, clocks, modules; sockets but those of files and IP.  From 424 on numbers are the same on every
machine: these calls came after 2019 (io_uring, pidfd, the mounts' new interface), and only a few of them are let
through, so that calls of kernels to come are refused as well.
"""

import errno
import platform
import struct

NAMES = {  # of the kernel's headers: numbers on x86_64 and aarch64
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "vmsplice": (278, 75),
    "personality": (135, 92),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
}
CLONE, SOCKET = (56, 220), (41, 198)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
NEW, LET_THROUGH = 424, (436, 437, 439, 441, 449)  # close_range, openat2, faccessat2, epoll_pwait2, futex_waitv
NAMESPACES = 0x7E020000  # clone's flags CLONE_NEW*
FAMILIES = (1, 2, 10)  # sockets of files, IPv4, IPv6

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, MACHINE, ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the first argument's lower half


def seccomp_filter(machine: str = "") -> bytes:
    """The program for a machine, by default this one; empty where numbers of its calls are not known here."""
    if (machine := machine or platform.machine()) not in MACHINES:
        return b""
    column, audit = MACHINES[machine]
    code = [_step(LOAD, MACHINE), *_unless(EQUAL, audit, KILL), _step(LOAD, NUMBER)]
    for number in LET_THROUGH:
        code += _where(EQUAL, number, ALLOW)
    code += _where(AT_LEAST, NEW, REFUSE | errno.ENOSYS)  # also clone3: libraries then take clone, whose flags are seen
    for numbers in NAMES.values():
        code += _where(EQUAL, numbers[column], REFUSE | errno.EPERM)
    flags = [_step(LOAD, ARGUMENT), *_where(ANY_BIT, NAMESPACES, REFUSE | errno.EPERM), _step(RETURN, ALLOW)]
    families = [_step(LOAD, ARGUMENT), *(step for family in FAMILIES for step in _where(EQUAL, family, ALLOW))]
    families += [_step(RETURN, REFUSE | errno.EAFNOSUPPORT)]
    for number, block in ((CLONE[column], flags), (SOCKET[column], families)):
        code += [_step(EQUAL, number, 0, len(block)), *block]
    return b"".join([*code, _step(RETURN, ALLOW)])


def _step(operation: int, value: int, matched: int = 0, otherwise: int = 0) -> bytes:
    """One instruction; the last two say how many of the next to skip after a comparison."""
    return struct.pack("=HBBI", operation, matched, otherwise, value)


def _where(operation: int, value: int, result: int) -> list[bytes]:
    return [_step(operation, value, 0, 1), _step(RETURN, result)]


def _unless(operation: int, value: int, result: int) -> list[bytes]:
    return [_step(operation, value, 1, 0), _step(RETURN, result)]
