//! Which pages of an address space are still in the image: the pager's own record, which the kernel does not keep.
//!
//! A page is outstanding until it was given to the process, or the process gave it back (unmapped it, asked for zeros).
//! A missing page that is not outstanding is a page of zeros.

use std::collections::BTreeMap;

use ckpt_core::PAGE_SIZE;

/// Pages that follow each other in memory and in the page file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Address of the first.
    pub start: u64,
    /// Number of the first in the page file.
    pub first: u64,
    pub pages: u64,
}

impl Run {
    pub fn end(self) -> u64 {
        self.start + self.pages * PAGE_SIZE
    }

    pub fn bytes(self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// The same without its first pages.
    pub fn after(self, pages: u64) -> Run {
        Run { start: self.start + pages * PAGE_SIZE, first: self.first + pages, pages: self.pages - pages }
    }
}

/// A run of the image, and which of its pages are outstanding.
#[derive(Clone, Debug)]
struct Segment {
    first: u64,
    pages: u64,
    bits: Vec<u64>,
    left: u64,
}

impl Segment {
    fn has(&self, page: u64) -> bool {
        self.bits[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// The first outstanding page in `page..end`.
    fn next(&self, mut page: u64, end: u64) -> Option<u64> {
        while page < end {
            let rest = self.bits[(page / 64) as usize] >> (page % 64);
            if rest != 0 {
                let found = page + u64::from(rest.trailing_zeros());
                return (found < end).then_some(found);
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }

    /// The first page in `page..end` that is not outstanding, or `end`.
    fn next_gap(&self, mut page: u64, end: u64) -> u64 {
        while page < end {
            let rest = !self.bits[(page / 64) as usize] >> (page % 64);
            if rest != 0 {
                return (page + u64::from(rest.trailing_zeros())).min(end);
            }
            page = (page / 64 + 1) * 64;
        }
        end
    }

    /// Takes pages out. Returns how many were outstanding.
    fn take(&mut self, from: u64, to: u64) -> u64 {
        let before = self.left;
        let mut page = from;
        while page < to {
            let word = &mut self.bits[(page / 64) as usize];
            let count = (64 - page % 64).min(to - page);
            let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << (page % 64) };
            self.left -= u64::from((*word & mask).count_ones());
            *word &= !mask;
            page += count;
        }
        before - self.left
    }
}

/// The outstanding pages of one address space.
#[derive(Clone, Debug, Default)]
pub struct Outstanding {
    segments: BTreeMap<u64, Segment>,
    left: u64,
}

impl Outstanding {
    /// Adds pages, none of which is there yet.
    pub fn add(&mut self, run: Run) {
        let mut bits = vec![u64::MAX; run.pages.div_ceil(64) as usize];
        if let (Some(last), 1..) = (bits.last_mut(), run.pages % 64) {
            *last = (1 << (run.pages % 64)) - 1;
        }
        self.left += run.pages;
        self.segments.insert(run.start, Segment { first: run.first, pages: run.pages, bits, left: run.pages });
    }

    /// How many pages are outstanding.
    pub fn left(&self) -> u64 {
        self.left
    }

    fn segment(&self, address: u64) -> Option<(u64, &Segment)> {
        let (&start, segment) = self.segments.range(..=address).next_back()?;
        (address - start < segment.pages * PAGE_SIZE).then_some((start, segment))
    }

    /// The page at an address, if it is outstanding.
    pub fn page(&self, address: u64) -> Option<Run> {
        let (start, segment) = self.segment(address)?;
        let page = (address - start) / PAGE_SIZE;
        segment.has(page).then(|| Run { start: address & !(PAGE_SIZE - 1), first: segment.first + page, pages: 1 })
    }

    /// The first outstanding pages in `start..end`, at most `most`.
    pub fn next(&self, start: u64, end: u64, most: u64) -> Option<Run> {
        let inside = self.segment(start).map(|(at, _)| at).unwrap_or(start);
        for (&at, segment) in self.segments.range(inside..end) {
            let from = start.saturating_sub(at) / PAGE_SIZE;
            let to = segment.pages.min((end - at).div_ceil(PAGE_SIZE));
            if let Some(page) = segment.next(from, to) {
                let gap = segment.next_gap(page, to.min(page.saturating_add(most)));
                return Some(Run { start: at + page * PAGE_SIZE, first: segment.first + page, pages: gap - page });
            }
        }
        None
    }

    /// These pages are there, or are zeros from now on. Returns how many were outstanding.
    pub fn take(&mut self, start: u64, end: u64) -> u64 {
        let inside = self.segment(start).map(|(at, _)| at).unwrap_or(start);
        let mut taken = 0;
        let mut empty = Vec::new();
        for (&at, segment) in self.segments.range_mut(inside..end) {
            let from = start.saturating_sub(at) / PAGE_SIZE;
            let to = segment.pages.min((end - at).div_ceil(PAGE_SIZE));
            if from < to {
                taken += segment.take(from, to);
            }
            if segment.left == 0 {
                empty.push(at);
            }
        }
        for at in empty {
            self.segments.remove(&at);
        }
        self.left -= taken;
        taken
    }

    /// Memory was moved, with what is outstanding of it.
    pub fn shift(&mut self, from: u64, to: u64, len: u64) {
        let mut moved = Vec::new();
        let mut at = from;
        while let Some(run) = self.next(at, from + len, u64::MAX) {
            moved.push(run);
            at = run.end();
        }
        self.take(from, from + len);
        // What was there before was unmapped.
        self.take(to, to + len);
        for run in moved {
            self.add_within(Run { start: run.start - from + to, ..run });
        }
    }

    /// Adds a run where a segment that has lost these pages may still be: its bits are set again if they mean the same, or
    /// it is cut in two.
    fn add_within(&mut self, run: Run) {
        let Some((start, _)) = self.overlapping(run) else { return self.add(run) };
        let segment = self.segments.remove(&start).expect("just found");
        self.left -= segment.left;
        let kept: Vec<Run> = runs_of(start, &segment);
        for part in kept {
            self.add(part);
        }
        // Another may overlap as well.
        self.add_within(run);
    }

    fn overlapping(&self, run: Run) -> Option<(u64, &Segment)> {
        let (&start, segment) = self.segments.range(..run.end()).next_back()?;
        (start + segment.pages * PAGE_SIZE > run.start).then_some((start, segment))
    }
}

/// The outstanding pages of a segment.
fn runs_of(start: u64, segment: &Segment) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut page = 0;
    while let Some(from) = segment.next(page, segment.pages) {
        let to = segment.next_gap(from, segment.pages);
        runs.push(Run { start: start + from * PAGE_SIZE, first: segment.first + from, pages: to - from });
        page = to;
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const P: u64 = PAGE_SIZE;

    fn run(start: u64, first: u64, pages: u64) -> Run {
        Run { start: start * P, first, pages }
    }

    fn of(runs: &[Run]) -> Outstanding {
        let mut all = Outstanding::default();
        for &run in runs {
            all.add(run);
        }
        all
    }

    #[test]
    fn pages_are_found_until_they_are_taken() {
        let mut all = of(&[run(10, 100, 200), run(300, 50, 1)]);
        assert_eq!(all.left(), 201);
        assert_eq!(all.page(11 * P + 5), Some(run(11, 101, 1)));
        assert_eq!(all.page(210 * P), None);
        assert_eq!(all.take(20 * P, 30 * P), 10);
        assert_eq!(all.take(20 * P, 30 * P), 0);
        assert_eq!(all.page(25 * P), None);
        assert_eq!(all.next(0, u64::MAX, 64), Some(run(10, 100, 10)));
        assert_eq!(all.next(20 * P, u64::MAX, 64), Some(run(30, 120, 64)));
        assert_eq!(all.next(20 * P, 32 * P, 64), Some(run(30, 120, 2)));
        assert_eq!(all.next(211 * P, u64::MAX, 64), Some(run(300, 50, 1)));
        assert_eq!(all.next(301 * P, u64::MAX, 64), None);
        assert_eq!(all.take(0, u64::MAX), 191);
        assert_eq!(all.left(), 0);
    }

    #[test]
    fn what_is_moved_keeps_its_content() {
        let mut all = of(&[run(10, 100, 20)]);
        all.take(12 * P, 14 * P);
        all.shift(11 * P, 50 * P, 5 * P);
        assert_eq!(all.page(11 * P), None);
        assert_eq!(all.page(50 * P), Some(run(50, 101, 1)));
        assert_eq!(all.page(51 * P), None, "taken before it was moved");
        assert_eq!(all.page(53 * P), Some(run(53, 104, 1)));
        assert_eq!(all.page(16 * P), Some(run(16, 106, 1)));
        assert_eq!(all.left(), 18);
        all.shift(50 * P, 11 * P, 5 * P);
        assert_eq!(all.page(11 * P), Some(run(11, 101, 1)));
        assert_eq!(all.left(), 18);
    }

    /// Against a map of single pages, which is slow and plain.
    #[test]
    fn any_sequence_of_changes_is_like_that_of_single_pages() {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for _ in 0..200 {
            let mut plain: BTreeMap<u64, u64> = BTreeMap::new();
            let mut all = Outstanding::default();
            for n in 0..4 {
                let run = run(n * 200 + next(100), n * 1000, 1 + next(100));
                all.add(run);
                plain.extend((0..run.pages).map(|page| (run.start / P + page, run.first + page)));
            }
            for _ in 0..30 {
                let (start, len) = (next(900), 1 + next(150));
                match next(3) {
                    0 => {
                        let to = start + len + next(300);
                        all.shift(start * P, to * P, len * P);
                        let moved: Vec<_> = plain.range(start..start + len).map(|(&at, &page)| (at, page)).collect();
                        plain.retain(|at, _| !(start..start + len).contains(at) && !(to..to + len).contains(at));
                        plain.extend(moved.into_iter().map(|(at, page)| (at - start + to, page)));
                    }
                    1 => {
                        let taken = all.take(start * P, (start + len) * P);
                        let before = plain.len();
                        plain.retain(|at, _| !(start..start + len).contains(at));
                        assert_eq!(taken as usize, before - plain.len());
                    }
                    _ => {
                        let found = all.next(start * P, (start + len) * P, 16);
                        let expected = plain.range(start..start + len).next();
                        assert_eq!(
                            found.map(|run| (run.start / P, run.first)),
                            expected.map(|(&at, &page)| (at, page))
                        );
                        for page in 0..found.map_or(0, |run| run.pages) {
                            let run = found.unwrap();
                            assert_eq!(plain.get(&(run.start / P + page)), Some(&(run.first + page)));
                        }
                    }
                }
                assert_eq!(all.left() as usize, plain.len());
                for at in 0..1400 {
                    assert_eq!(all.page(at * P).map(|run| run.first), plain.get(&at).copied(), "page {at}");
                }
            }
        }
    }
}
