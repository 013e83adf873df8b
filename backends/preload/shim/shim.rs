//! The shim: what `LD_PRELOAD` brings into a program that is to be saved.
//!
//! It takes one signal, and in its handler has each thread enter the agent, from where a driver sees the thread as any
//! other target. It wraps the calls that start programs, so that what they start has the shim too. It keeps no
//! descriptor, no thread and no file, and no state but what a freeze needs.
//!
//! # Rules
//! The handler runs inside a foreign process, in threads that hold any lock and in any state. So: no allocation, no
//! locks, no std, no libc, no thread-local storage; raw system calls only, which leave `errno` alone. What replaces
//! functions of libc may call libc as the program would.
//!
//! # Safety
//! Pointers come from the kernel (signal frames, the initial stack), from the program's own calls, which keep to what C
//! says of them, or from the driver, which lays out the region that it sent.
#![no_std]
#![allow(clippy::missing_safety_doc)]

#[path = "../../agent/src/protocol.rs"]
#[allow(dead_code)]
mod agent;
mod altstack;
mod by_number;
mod calls;
mod commands;
mod environment;
mod exec;
mod freeze;
mod ids;
mod interface;
#[path = "../src/protocol.rs"]
#[allow(dead_code)]
mod protocol;
mod start;
#[path = "../src/translation.rs"]
#[allow(dead_code)]
mod translation;
mod unprotected;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Nothing here panics on purpose; a program that must not go on wrongly ends as by abort().
    loop {
        // SAFETY: no memory is passed.
        unsafe {
            calls::kill_self(6);
        }
    }
}
