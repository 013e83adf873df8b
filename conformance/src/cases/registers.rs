//! Registers of a thread that runs, and does not wait in the kernel, while it is dumped.

use std::arch::asm;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use crate::case::{Case, Checkpoint};
use crate::expect::{equal, in_child};

pub fn cases() -> Vec<Case> {
    let registers = &["registers"];
    vec![
        Case::new("registers/general", registers, |checkpoint| held(checkpoint, general)),
        Case::new("registers/flags", registers, |checkpoint| held(checkpoint, flags)),
        Case::new("registers/x87", registers, |checkpoint| held(checkpoint, x87)),
        Case::new("registers/sse", registers, |checkpoint| held(checkpoint, sse)),
        Case::new("registers/bases", registers, |checkpoint| held(checkpoint, bases)),
        Case::new("registers/rseq", registers, rseq),
        Case::new("registers/avx", registers, |checkpoint| held(checkpoint, avx))
            .needs_cpu("AVX", || std::is_x86_feature_detected!("avx")),
        Case::new("registers/avx512", registers, |checkpoint| held(checkpoint, avx512)).needs_cpu("AVX-512", || {
            std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bw")
        }),
        Case::new("registers/protection-keys", registers, |checkpoint| held(checkpoint, protection_keys))
            .needs_cpu("protection keys", has_protection_keys),
        Case::new("registers/tiles", &["registers", "attributes"], tiles)
            .needs(&["AMX tiles"])
            .needs_cpu("AMX", has_tiles),
        Case::new("registers/tiles-not-used", &["registers", "attributes", "tasks"], tiles_not_used)
            .needs_cpu("AMX", has_tiles),
    ]
}

/// Runs `hold` on two threads, with a seed and a flag, while the subject is dumped; it holds its registers until the flag is set,
/// and says what it lost.
fn held(checkpoint: &Checkpoint, hold: fn(u64, &AtomicBool, &AtomicU32) -> Result<(), String>) -> Result<(), String> {
    let (go, running) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let threads: Vec<_> = [3, 5]
            .map(|seed| {
                scope.spawn({
                    let (go, running) = (&go, &running);
                    move || hold(seed, go, running)
                })
            })
            .into();
        while running.load(SeqCst) < 2 {
            std::thread::yield_now();
        }
        let waited = checkpoint.wait();
        go.store(true, SeqCst);
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        waited.and(results.into_iter().collect())
    })
}

fn same<T: PartialEq + std::fmt::LowerHex>(what: &str, expected: &[T], found: &[T]) -> Result<(), String> {
    match expected.iter().zip(found).position(|(expected, found)| expected != found) {
        None => Ok(()),
        Some(at) => Err(format!("{what} {at} was {:#x}, is {:#x}", expected[at], found[at])),
    }
}

fn bytes<const N: usize>(seed: u64) -> [u8; N] {
    std::array::from_fn(|at| (at as u64 * 37 + seed * 11 + 1) as u8)
}

fn general(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    let expected: [u64; 11] = std::array::from_fn(|at| (at as u64 + 1) * 0x0123_4567_89ab_cdef * seed);
    let mut values = expected;
    // SAFETY: reads the flag until it is set; every register is declared, or saved by hand (rbx, rbp).
    unsafe {
        asm!(
            "lock inc dword ptr [rdx]",
            "push rbx", "push rbp", "push rax", "push rdx",
            "mov rbx, [rax]", "mov rbp, [rax + 8]", "mov rdi, [rax + 16]", "mov r8, [rax + 24]", "mov r9, [rax + 32]",
            "mov r10, [rax + 40]", "mov r11, [rax + 48]", "mov r12, [rax + 56]", "mov r13, [rax + 64]",
            "mov r14, [rax + 72]", "mov r15, [rax + 80]",
            "2:", "cmp byte ptr [rcx], 0", "je 2b",
            "pop rdx", "pop rax",
            "mov [rax], rbx", "mov [rax + 8], rbp", "mov [rax + 16], rdi", "mov [rax + 24], r8", "mov [rax + 32], r9",
            "mov [rax + 40], r10", "mov [rax + 48], r11", "mov [rax + 56], r12", "mov [rax + 64], r13",
            "mov [rax + 72], r14", "mov [rax + 80], r15",
            "pop rbp", "pop rbx",
            in("rax") values.as_mut_ptr(), in("rcx") go.as_ptr(), in("rdx") running.as_ptr(),
            out("rdi") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _,
            out("r14") _, out("r15") _,
        );
    }
    same("general register", &expected, &values)
}

/// The arithmetic flags, the direction flag, and rax with rdx.
fn flags(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    // CF, PF, AF, ZF, SF, DF, OF, and what is always set.
    let expected: u64 = if seed == 3 { 0x0cd5 | 2 } else { 0x0411 | 2 };
    let mut found = expected;
    // SAFETY: sets flags and clears the direction flag again; the loop leaves the flags alone but for `loop`'s counter:
    // jrcxz and mov do not touch them.
    unsafe {
        asm!(
            "lock inc dword ptr [rdx]",
            "push {value}", "popfq",
            "2:", "movzx ecx, byte ptr [{go}]", "jrcxz 2b",
            "pushfq", "pop {value}", "cld",
            value = inout(reg) found, go = in(reg) go.as_ptr(), in("rdx") running.as_ptr(), out("rcx") _,
        );
    }
    // Only what was set on purpose: the trap and resume flags and the like are the kernel's.
    same("the flags", &[expected & 0x0cd5], &[found & 0x0cd5])
}

fn x87(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    let expected: [f64; 8] = std::array::from_fn(|at| (at as f64 + 0.5) * seed as f64 / 3.0);
    let mut values = expected;
    // Round down, 53 bits; another rounding in MXCSR.
    let (control, mxcsr) = (0x067f_u16, 0x5f80_u32);
    let (mut found_control, mut found_mxcsr, mut old_control, mut old_mxcsr) = (0_u16, 0_u32, 0_u16, 0_u32);
    let words = [
        &control as *const u16 as u64,
        &raw mut found_control as u64,
        &raw mut old_control as u64,
        &mxcsr as *const u32 as u64,
        &raw mut found_mxcsr as u64,
        &raw mut old_mxcsr as u64,
    ];
    // SAFETY: fills the empty x87 stack and empties it again; control words are put back as they were. The addresses are
    // of live variables.
    unsafe {
        asm!(
            "mov {t}, [{w} + 16]", "fnstcw [{t}]", "mov {t}, [{w} + 40]", "stmxcsr [{t}]",
            "mov {t}, [{w}]", "fldcw [{t}]", "mov {t}, [{w} + 24]", "ldmxcsr [{t}]",
            "fld qword ptr [{v}]", "fld qword ptr [{v} + 8]", "fld qword ptr [{v} + 16]", "fld qword ptr [{v} + 24]",
            "fld qword ptr [{v} + 32]", "fld qword ptr [{v} + 40]", "fld qword ptr [{v} + 48]", "fld qword ptr [{v} + 56]",
            "lock inc dword ptr [{running}]",
            "2:", "cmp byte ptr [{go}], 0", "je 2b",
            "fstp qword ptr [{v} + 56]", "fstp qword ptr [{v} + 48]", "fstp qword ptr [{v} + 40]", "fstp qword ptr [{v} + 32]",
            "fstp qword ptr [{v} + 24]", "fstp qword ptr [{v} + 16]", "fstp qword ptr [{v} + 8]", "fstp qword ptr [{v}]",
            "mov {t}, [{w} + 8]", "fnstcw [{t}]", "mov {t}, [{w} + 32]", "stmxcsr [{t}]",
            "mov {t}, [{w} + 16]", "fldcw [{t}]", "mov {t}, [{w} + 40]", "ldmxcsr [{t}]",
            w = in(reg) words.as_ptr(), v = in(reg) values.as_mut_ptr(), t = out(reg) _,
            go = in(reg) go.as_ptr(), running = in(reg) running.as_ptr(),
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    same("x87 register", &expected.map(f64::to_bits), &values.map(f64::to_bits))?;
    same("the x87 control word", &[control], &[found_control])?;
    // The low six bits say what happened, not what was asked for.
    same("MXCSR", &[mxcsr & !0x3f], &[found_mxcsr & !0x3f])
}

fn sse(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    let expected: [u8; 256] = bytes(seed);
    let mut values = expected;
    // SAFETY: reads and writes 256 bytes; every register is declared.
    unsafe {
        asm!(
            "movdqu xmm0, [{v}]", "movdqu xmm1, [{v} + 16]", "movdqu xmm2, [{v} + 32]", "movdqu xmm3, [{v} + 48]",
            "movdqu xmm4, [{v} + 64]", "movdqu xmm5, [{v} + 80]", "movdqu xmm6, [{v} + 96]", "movdqu xmm7, [{v} + 112]",
            "movdqu xmm8, [{v} + 128]", "movdqu xmm9, [{v} + 144]", "movdqu xmm10, [{v} + 160]", "movdqu xmm11, [{v} + 176]",
            "movdqu xmm12, [{v} + 192]", "movdqu xmm13, [{v} + 208]", "movdqu xmm14, [{v} + 224]", "movdqu xmm15, [{v} + 240]",
            "lock inc dword ptr [{running}]",
            "2:", "cmp byte ptr [{go}], 0", "je 2b",
            "movdqu [{v}], xmm0", "movdqu [{v} + 16], xmm1", "movdqu [{v} + 32], xmm2", "movdqu [{v} + 48], xmm3",
            "movdqu [{v} + 64], xmm4", "movdqu [{v} + 80], xmm5", "movdqu [{v} + 96], xmm6", "movdqu [{v} + 112], xmm7",
            "movdqu [{v} + 128], xmm8", "movdqu [{v} + 144], xmm9", "movdqu [{v} + 160], xmm10", "movdqu [{v} + 176], xmm11",
            "movdqu [{v} + 192], xmm12", "movdqu [{v} + 208], xmm13", "movdqu [{v} + 224], xmm14", "movdqu [{v} + 240], xmm15",
            v = in(reg) values.as_mut_ptr(), go = in(reg) go.as_ptr(), running = in(reg) running.as_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
    same("byte of the SSE registers", &expected, &values)
}

fn avx(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    // SAFETY: the case is only there where the CPU has AVX.
    unsafe { hold_avx(seed, go, running) }
}

#[target_feature(enable = "avx")]
fn hold_avx(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    let expected: [u8; 512] = bytes(seed);
    let mut values = expected;
    // SAFETY: reads and writes 512 bytes; every register is declared.
    unsafe {
        asm!(
            "vmovdqu ymm0, [{v}]", "vmovdqu ymm1, [{v} + 32]", "vmovdqu ymm2, [{v} + 64]", "vmovdqu ymm3, [{v} + 96]",
            "vmovdqu ymm4, [{v} + 128]", "vmovdqu ymm5, [{v} + 160]", "vmovdqu ymm6, [{v} + 192]", "vmovdqu ymm7, [{v} + 224]",
            "vmovdqu ymm8, [{v} + 256]", "vmovdqu ymm9, [{v} + 288]", "vmovdqu ymm10, [{v} + 320]", "vmovdqu ymm11, [{v} + 352]",
            "vmovdqu ymm12, [{v} + 384]", "vmovdqu ymm13, [{v} + 416]", "vmovdqu ymm14, [{v} + 448]", "vmovdqu ymm15, [{v} + 480]",
            "lock inc dword ptr [{running}]",
            "2:", "cmp byte ptr [{go}], 0", "je 2b",
            "vmovdqu [{v}], ymm0", "vmovdqu [{v} + 32], ymm1", "vmovdqu [{v} + 64], ymm2", "vmovdqu [{v} + 96], ymm3",
            "vmovdqu [{v} + 128], ymm4", "vmovdqu [{v} + 160], ymm5", "vmovdqu [{v} + 192], ymm6", "vmovdqu [{v} + 224], ymm7",
            "vmovdqu [{v} + 256], ymm8", "vmovdqu [{v} + 288], ymm9", "vmovdqu [{v} + 320], ymm10", "vmovdqu [{v} + 352], ymm11",
            "vmovdqu [{v} + 384], ymm12", "vmovdqu [{v} + 416], ymm13", "vmovdqu [{v} + 448], ymm14", "vmovdqu [{v} + 480], ymm15",
            v = in(reg) values.as_mut_ptr(), go = in(reg) go.as_ptr(), running = in(reg) running.as_ptr(),
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
            out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _,
            out("ymm13") _, out("ymm14") _, out("ymm15") _,
        );
    }
    same("byte of the AVX registers", &expected, &values)
}

fn avx512(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    // SAFETY: the case is only there where the CPU has AVX-512 F and BW.
    unsafe { hold_avx512(seed, go, running) }
}

/// Some of the lower 16 registers, all kinds of the upper 16, and the masks.
#[target_feature(enable = "avx512f,avx512bw")]
fn hold_avx512(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    let expected: [u8; 568] = bytes(seed);
    let mut values = expected;
    // SAFETY: reads and writes 568 bytes; every register is declared.
    unsafe {
        asm!(
            "vmovdqu64 zmm0, [{v}]", "vmovdqu64 zmm7, [{v} + 64]", "vmovdqu64 zmm15, [{v} + 128]", "vmovdqu64 zmm16, [{v} + 192]",
            "vmovdqu64 zmm17, [{v} + 256]", "vmovdqu64 zmm23, [{v} + 320]", "vmovdqu64 zmm30, [{v} + 384]", "vmovdqu64 zmm31, [{v} + 448]",
            "kmovq k1, [{v} + 512]", "kmovq k2, [{v} + 520]", "kmovq k3, [{v} + 528]", "kmovq k4, [{v} + 536]",
            "kmovq k5, [{v} + 544]", "kmovq k6, [{v} + 552]", "kmovq k7, [{v} + 560]",
            "lock inc dword ptr [{running}]",
            "2:", "cmp byte ptr [{go}], 0", "je 2b",
            "vmovdqu64 [{v}], zmm0", "vmovdqu64 [{v} + 64], zmm7", "vmovdqu64 [{v} + 128], zmm15", "vmovdqu64 [{v} + 192], zmm16",
            "vmovdqu64 [{v} + 256], zmm17", "vmovdqu64 [{v} + 320], zmm23", "vmovdqu64 [{v} + 384], zmm30", "vmovdqu64 [{v} + 448], zmm31",
            "kmovq [{v} + 512], k1", "kmovq [{v} + 520], k2", "kmovq [{v} + 528], k3", "kmovq [{v} + 536], k4",
            "kmovq [{v} + 544], k5", "kmovq [{v} + 552], k6", "kmovq [{v} + 560], k7",
            v = in(reg) values.as_mut_ptr(), go = in(reg) go.as_ptr(), running = in(reg) running.as_ptr(),
            out("zmm0") _, out("zmm7") _, out("zmm15") _, out("zmm16") _, out("zmm17") _, out("zmm23") _, out("zmm30") _,
            out("zmm31") _, out("k1") _, out("k2") _, out("k3") _, out("k4") _, out("k5") _, out("k6") _, out("k7") _,
        );
    }
    same("byte of the AVX-512 registers", &expected, &values)
}

/// The base of gs, which the C library leaves to programs; that of fs is behind every thread-local variable.
fn bases(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    const ARCH_SET_GS: i64 = 0x1001;
    let words = [seed, seed * 2, seed * 3];
    std::thread_local!(static LOCAL: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
    LOCAL.set(seed);
    let mut found = [0_u64; 2];
    // SAFETY: nothing else in this thread uses gs; the loop only reads.
    unsafe {
        if libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, words.as_ptr()) != 0 {
            return Err(format!("arch_prctl: {}", std::io::Error::last_os_error()));
        }
        running.fetch_add(1, SeqCst);
        asm!(
            "2:", "cmp byte ptr [{go}], 0", "je 2b",
            "mov {one}, qword ptr gs:[0]", "mov {two}, qword ptr gs:[16]",
            go = in(reg) go.as_ptr(), one = out(reg) found[0], two = out(reg) found[1],
        );
        libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, 0);
    }
    same("the word behind gs", &[words[0], words[2]], &found)?;
    same("a thread-local variable", &[seed], &[LOCAL.get()])
}

fn has_protection_keys() -> bool {
    // SAFETY: cpuid is there on every x86-64.
    let leaf = std::arch::x86_64::__cpuid_count(7, 0);
    // OSPKE: the CPU has them and the kernel lets programs use them.
    leaf.ecx & (1 << 4) != 0
}

fn protection_keys(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    // Nothing is mapped with keys 14 and 15.
    let wanted = 0x4000_0000_u32 | if seed == 3 { 0x8000_0000 } else { 0x1000_0000 };
    let found: u32;
    // SAFETY: rights of keys that no mapping has.
    unsafe {
        asm!(
            "xor ecx, ecx", "xor edx, edx", "wrpkru",
            "lock inc dword ptr [{running}]",
            "2:", "cmp byte ptr [{go}], 0", "je 2b",
            "xor ecx, ecx", "rdpkru",
            inout("eax") wanted => found, out("ecx") _, out("edx") _,
            go = in(reg) go.as_ptr(), running = in(reg) running.as_ptr(),
        );
    }
    same("PKRU", &[wanted], &[found])
}

/// Component 18 of the xsave area: tile data of AMX.
const TILE_DATA: u32 = 18;

/// AMX, and a kernel that lets programs ask for it (5.16).
fn has_tiles() -> bool {
    const ARCH_GET_XCOMP_SUPP: i64 = 0x1021;
    let mut features = 0_u64;
    // SAFETY: the kernel writes one word.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &mut features) };
    result == 0 && features >> TILE_DATA & 1 == 1
}

fn ask_for_tiles() -> Result<(), String> {
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    // SAFETY: no memory is passed.
    match unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) } {
        0 => Ok(()),
        _ => Err(format!("asking for AMX: {}", std::io::Error::last_os_error())),
    }
}

fn may_use_tiles() -> bool {
    const ARCH_GET_XCOMP_PERM: i64 = 0x1022;
    let mut features = 0_u64;
    // SAFETY: the kernel writes one word.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &mut features) };
    features >> TILE_DATA & 1 == 1
}

/// What `ldtilecfg` loads: eight tiles of `rows` rows of 64 bytes.
fn tile_configuration(rows: u8) -> [u8; 64] {
    let mut configuration = [0; 64];
    configuration[0] = 1;
    for tile in 0..8 {
        configuration[16 + 2 * tile] = 64;
        configuration[48 + tile] = rows;
    }
    configuration
}

/// Two threads have tiles, and one only their configuration; the main thread has used them and let go of them.
fn tiles(checkpoint: &Checkpoint) -> Result<(), String> {
    ask_for_tiles()?;
    let idle = tile_configuration(3);
    // SAFETY: nothing else in this thread uses tiles.
    unsafe { asm!("ldtilecfg [{}]", "tilezero tmm1", "tilerelease", in(reg) idle.as_ptr()) };
    held(checkpoint, hold_tiles)?;
    // SAFETY: as above.
    unsafe { asm!("ldtilecfg [{}]", "tilezero tmm1", "tilerelease", in(reg) idle.as_ptr()) };
    equal("the permission", true, may_use_tiles())
}

fn hold_tiles(seed: u64, go: &AtomicBool, running: &AtomicU32) -> Result<(), String> {
    let configuration = tile_configuration(if seed == 3 { 16 } else { 5 });
    let rows = usize::from(configuration[48]);
    let expected: [[u8; 1024]; 8] = std::array::from_fn(|tile| bytes(seed * 100 + tile as u64));
    let mut values = [[0_u8; 1024]; 8];
    let mut found_configuration = [0_u8; 64];
    // SAFETY: reads and writes as much as the configuration says, 1024 bytes a tile at most; nothing else in this thread
    // uses tiles, and the compiler has none.
    unsafe {
        asm!(
            "ldtilecfg [{c}]",
            "tileloadd tmm0, [{e} + {s}]", "tileloadd tmm1, [{e} + {s} + 1024]",
            "tileloadd tmm2, [{e} + {s} + 2048]", "tileloadd tmm3, [{e} + {s} + 3072]",
            "tileloadd tmm4, [{e} + {s} + 4096]", "tileloadd tmm5, [{e} + {s} + 5120]",
            "tileloadd tmm6, [{e} + {s} + 6144]", "tileloadd tmm7, [{e} + {s} + 7168]",
            "lock inc dword ptr [{running}]",
            "2:", "cmp byte ptr [{go}], 0", "je 2b",
            "tilestored [{v} + {s}], tmm0", "tilestored [{v} + {s} + 1024], tmm1",
            "tilestored [{v} + {s} + 2048], tmm2", "tilestored [{v} + {s} + 3072], tmm3",
            "tilestored [{v} + {s} + 4096], tmm4", "tilestored [{v} + {s} + 5120], tmm5",
            "tilestored [{v} + {s} + 6144], tmm6", "tilestored [{v} + {s} + 7168], tmm7",
            "sttilecfg [{f}]",
            "tilerelease",
            c = in(reg) configuration.as_ptr(), e = in(reg) expected.as_ptr(), v = in(reg) values.as_mut_ptr(),
            f = in(reg) found_configuration.as_mut_ptr(), s = in(reg) 64_u64,
            go = in(reg) go.as_ptr(), running = in(reg) running.as_ptr(),
        );
    }
    same("byte of the tile configuration", &configuration, &found_configuration)?;
    for tile in 0..8 {
        same(&format!("tile {tile}, byte"), &expected[tile][..rows * 64], &values[tile][..rows * 64])?;
    }
    Ok(())
}

/// Leave to use tiles, which nobody has used yet; a configuration without tiles; and a child from before the leave.
fn tiles_not_used(checkpoint: &Checkpoint) -> Result<(), String> {
    let go = checkpoint.clone();
    let before = in_child(move || {
        go.wait_for_go()?;
        equal("the permission of a child that never asked", false, may_use_tiles())
    })?;
    ask_for_tiles()?;
    let go = checkpoint.clone();
    let after = in_child(move || {
        go.wait_for_go()?;
        equal("the permission of a child from after it was asked for", true, may_use_tiles())?;
        hold_tiles(7, &AtomicBool::new(true), &AtomicU32::new(0))
    })?;
    let configuration = tile_configuration(9);
    let mut found = [0_u8; 64];
    // SAFETY: nothing else in this thread uses tiles.
    unsafe { asm!("ldtilecfg [{}]", in(reg) configuration.as_ptr()) };
    checkpoint.wait()?;
    // SAFETY: as above; 64 bytes are written.
    unsafe { asm!("sttilecfg [{}]", "tilerelease", in(reg) found.as_mut_ptr()) };
    same("byte of the tile configuration", &configuration, &found)?;
    equal("the permission", true, may_use_tiles())?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| hold_tiles(5, &AtomicBool::new(true), &AtomicU32::new(0)));
        thread.join().expect("no panic")
    })?;
    before.passed()?;
    after.passed()
}

/// The kernel goes on writing the number of the CPU to where the C library has registered it, for every thread.
fn rseq(checkpoint: &Checkpoint) -> Result<(), String> {
    let cpu = || -> Result<u32, String> {
        let area = c_library_rseq()?;
        // SAFETY: cpu_id is the second word of the area that the C library keeps for each thread.
        Ok(unsafe { area.cast::<u32>().add(1).read_volatile() })
    };
    let current = || -> Result<(), String> {
        // A thread may be moved between the two questions, but not each time.
        for _ in 0..1000 {
            let mut kernel = 0_u32;
            // SAFETY: asks only; by the system call, as the C library would look into the area itself.
            unsafe { libc::syscall(libc::SYS_getcpu, &mut kernel, std::ptr::null_mut::<u32>(), 0) };
            if cpu()? == kernel {
                return Ok(());
            }
        }
        Err(format!("the rseq area does not follow the CPU: it says {}", cpu()? as i32))
    };
    let everywhere = || -> Result<(), String> {
        let all = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).map_err(|error| error.to_string())?;
        for cpu in (0..nix::sched::CpuSet::count()).filter(|&cpu| all.is_set(cpu).unwrap_or(false)) {
            let mut one = nix::sched::CpuSet::new();
            one.set(cpu)
                .and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one))
                .map_err(|error| error.to_string())?;
            current()?;
        }
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &all).map_err(|error| error.to_string())
    };
    everywhere()?;
    let (go, running) = (&AtomicBool::new(false), &AtomicBool::new(false));
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            running.store(true, SeqCst);
            while !go.load(SeqCst) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            everywhere()
        });
        // A thread that starts still maps memory of its own, which would be seen.
        while !running.load(SeqCst) {
            std::thread::yield_now();
        }
        let waited = checkpoint.wait();
        go.store(true, SeqCst);
        other.join().expect("no panic")?;
        waited
    })?;
    everywhere()
}

/// The rseq area of this thread, where glibc (2.35 and later) says it is: `__rseq_offset` from the thread pointer.
fn c_library_rseq() -> Result<*const u8, String> {
    // SAFETY: looks a symbol up; both are data of the C library.
    unsafe {
        let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        if symbol.is_null() {
            return Err("this C library does not register rseq".into());
        }
        let thread_pointer: *const u8;
        asm!("mov {}, fs:0", out(reg) thread_pointer);
        Ok(thread_pointer.offset(*symbol))
    }
}
