//! Registers and rseq of a thread.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct ContextV1 for ckpt_core::Context {
        registers: RegistersV1,
        blocked: u64,
        rseq: Option<RseqV1>,
        timeout_left: Option<u64>,
    }
}

wire_struct! {
    pub struct RegistersV1 for ckpt_core::Registers {
        general: GeneralV1,
        xsave: Bytes,
    }
}

wire_struct! {
    pub struct GeneralV1 for ckpt_core::General {
        r15: u64,
        r14: u64,
        r13: u64,
        r12: u64,
        rbp: u64,
        rbx: u64,
        r11: u64,
        r10: u64,
        r9: u64,
        r8: u64,
        rax: u64,
        rcx: u64,
        rdx: u64,
        rsi: u64,
        rdi: u64,
        orig_rax: u64,
        rip: u64,
        cs: u64,
        eflags: u64,
        rsp: u64,
        ss: u64,
        fs_base: u64,
        gs_base: u64,
        ds: u64,
        es: u64,
        fs: u64,
        gs: u64,
    }
}

wire_struct! {
    pub struct RseqV1 for ckpt_core::Rseq {
        address: u64,
        size: u32,
        signature: u32,
        flags: u32,
    }
}
