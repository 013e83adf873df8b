//! A first guess of the working set, from what is in an image: the pages that the threads were at work with when they were
//! saved. Those are their stacks from the stack pointer on, and what the registers and the words there point to.
//!
//! Which pages were touched of late the kernel tells nobody who is not to change it (`/proc/PID/clear_refs`), unless it
//! was built to (`CONFIG_IDLE_PAGE_TRACKING`, which distributions leave out).

use std::collections::BTreeSet;
use std::path::Path;

use ckpt_core::PAGE_SIZE;
use ckpt_core::image::Process;
use ckpt_core::resource::memory::Source;
use ckpt_core::store::ImageReader;

use crate::working_set::WorkingSet;

/// Bytes of a stack, from its pointer on, that are looked through for what they point to.
const LOOKED_THROUGH: u64 = 4096;
/// Pages of a stack, from its pointer on.
const OF_STACK: u64 = 4;
/// Pages in all.
const MOST: usize = 16 << 10;

/// Leaves a first guess beside an image that was just written.
///
/// # Errors
/// In words. Without a guess a restore is as good, but for a few faults.
pub fn leave_first_guess(image: &Path, reader: &dyn ImageReader) -> Result<(), String> {
    let mut pages = BTreeSet::new();
    for process in &reader.image().processes {
        guess(process, reader, &mut pages);
    }
    let mut set = WorkingSet::default();
    pages.into_iter().for_each(|page| set.push(page));
    set.store_guess(image).map_err(|error| format!("the first guess of a working set: {error}"))
}

/// Where saved pages of private memory are.
struct Places(Vec<(u64, u64, u64)>);

impl Places {
    fn of(process: &Process) -> Places {
        let mappings = process.memory.mappings.iter().filter(|mapping| mapping.source == Source::Anonymous);
        let runs = mappings.flat_map(|mapping| &mapping.pages);
        let mut places: Vec<_> = runs.map(|run| (run.start, run.extent.pages, run.extent.first)).collect();
        places.sort_unstable();
        Places(places)
    }

    /// The number in the page file of the page at an address.
    fn page(&self, address: u64) -> Option<u64> {
        let at = self.0.partition_point(|(start, ..)| *start <= address).checked_sub(1)?;
        let (start, pages, first) = self.0[at];
        let page = (address - start) / PAGE_SIZE;
        (page < pages).then_some(first + page)
    }
}

fn guess(process: &Process, reader: &dyn ImageReader, pages: &mut BTreeSet<u64>) {
    let places = Places::of(process);
    let mut note = |address: u64| {
        if pages.len() < MOST
            && let Some(page) = places.page(address)
        {
            pages.insert(page);
        }
    };
    for thread in &process.threads {
        let registers = &thread.context.registers.general;
        let stack = registers.rsp;
        (0..OF_STACK).for_each(|page| note(stack.saturating_add(page * PAGE_SIZE)));
        let pointers = [registers.rax, registers.rbx, registers.rcx, registers.rdx, registers.rsi, registers.rdi];
        let others = [registers.r8, registers.r9, registers.r10, registers.r11, registers.r12, registers.r13];
        let rest = [registers.r14, registers.r15, registers.rbp, registers.rip, registers.fs_base];
        pointers.into_iter().chain(others).chain(rest).for_each(&mut note);
        note(thread.context.rseq.map_or(0, |rseq| rseq.address.0));
        let mut at = stack;
        while at < stack.saturating_add(LOOKED_THROUGH) {
            let within = at % PAGE_SIZE;
            let length = (PAGE_SIZE - within) as usize;
            let mut bytes = vec![0; length];
            let Some(page) = places.page(at) else { break };
            let read = nix::sys::uio::pread(reader.pages(), &mut bytes, (page * PAGE_SIZE + within) as i64);
            if read != Ok(length) {
                break;
            }
            let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
            words.for_each(&mut note);
            at += length as u64;
        }
    }
}
