//! The cases, one file a kind of state, with the name that the kind has everywhere.

use crate::case::Case;

mod attributes;
mod c_library;
mod calls;
mod cgroups;
mod compiled;
mod credentials;
mod descriptors;
mod devices;
mod epoll;
mod eventfd;
mod fifos;
mod files;
mod filesystem;
mod inet_sockets;
mod inotify;
mod limits;
mod locks;
mod memory;
mod mqueues;
mod passed;
mod pidfds;
mod pipes;
mod programs;
mod registers;
mod scheduling;
mod signalfd;
mod signals;
mod snapshots;
mod sysvipc;
mod tasks;
mod tcp;
mod terminals;
mod timerfd;
mod timers;
mod unix_sockets;
mod untouched;

/// Every case. A new file is a `mod` line above and a line here, both sorted.
pub fn all() -> Vec<Case> {
    let files: &[fn() -> Vec<Case>] = &[
        attributes::cases, //
        c_library::cases,
        calls::cases,
        cgroups::cases,
        credentials::cases,
        descriptors::cases,
        devices::cases,
        epoll::cases,
        eventfd::cases,
        fifos::cases,
        files::cases,
        filesystem::cases,
        inet_sockets::cases,
        inotify::cases,
        limits::cases,
        locks::cases,
        memory::cases,
        mqueues::cases,
        passed::cases,
        pidfds::cases,
        pipes::cases,
        programs::cases,
        registers::cases,
        scheduling::cases,
        signalfd::cases,
        signals::cases,
        snapshots::cases,
        sysvipc::cases,
        tasks::cases,
        tcp::cases,
        terminals::cases,
        timerfd::cases,
        timers::cases,
        unix_sockets::cases,
        untouched::cases,
    ];
    files.iter().flat_map(|cases| cases()).collect()
}

/// The case of this name.
pub fn find(name: &str) -> Option<Case> {
    all().into_iter().find(|case| case.name == name)
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_unique_and_resources_exist() {
        let sections = ckpt_core::resource::names();
        let mut seen = std::collections::BTreeSet::new();
        for case in super::all() {
            assert!(seen.insert(case.name), "two cases are called {}", case.name);
            assert!(case.name.split_once('/').is_some(), "{} is not KIND/WHAT", case.name);
            for resource in case.resources {
                assert!(sections.contains(resource), "{}: there is no section {resource}", case.name);
            }
        }
    }
}
