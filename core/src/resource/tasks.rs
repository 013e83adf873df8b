//! Processes and threads: their ids, sessions, groups, namespaces, and what they share with each other.
//!
//! Skeletons are made parent by parent, so that a process gets its session by being born in it or by `setsid`. What
//! could not be made again in this way is refused at the dump.

use std::collections::HashSet;

use crate::backend::{DumpOptions, FrozenProcess};
use crate::error::{DumpError, Refusal};
use crate::image::{Task, Zombie};
use crate::procfs::ProcDir;
use crate::resource::Check;
use crate::target::{Kcmp, Pid, Target};

/// The section name.
pub const NAME: &str = "tasks";

fn refusal(pid: Pid, subject: &str, why: impl Into<String>, help: &str) -> Refusal {
    Refusal { resource: NAME, pid: Some(pid), subject: subject.into(), why: why.into(), help: help.into() }
}

/// Refuses trees that could not be made again.
pub fn examine(
    targets: &[Box<dyn Target>],
    processes: &[FrozenProcess],
    zombies: &[Zombie],
    options: &DumpOptions,
    refusals: &mut Vec<Refusal>,
) -> Result<(), DumpError> {
    examine_sessions(processes, zombies, options, refusals);
    for zombie in zombies {
        // The kernel sets the flag itself, for those that wrote a core file.
        if libc::WIFSIGNALED(zombie.status) && libc::WCOREDUMP(zombie.status) {
            let why = format!(
                "it was ended by signal {} with a core dump, and its status could not say so again",
                libc::WTERMSIG(zombie.status)
            );
            refusals.push(refusal(zombie.task.pid, "", why, "have its parent wait for it"));
        }
    }
    for target in targets {
        examine_namespaces(&**target, refusals)?;
    }
    examine_sharing(targets, refusals)
}

fn examine_sessions(
    processes: &[FrozenProcess],
    zombies: &[Zombie],
    options: &DumpOptions,
    refusals: &mut Vec<Refusal>,
) {
    let tasks: Vec<&Task> =
        processes.iter().map(|process| &process.task).chain(zombies.iter().map(|zombie| &zombie.task)).collect();
    let root = tasks[0];
    if root.sid != root.pid && !options.shell_job {
        refusals.push(refusal(
            root.pid,
            "",
            format!("it is in session {}, whose leader is not part of the tree", root.sid),
            "use --shell-job to have it go on in the session of a later restore, or start it with `ckpt run` or setsid",
        ));
    }
    for task in &tasks[1..] {
        let Some(parent) = tasks.iter().find(|parent| parent.pid == task.ppid) else {
            let why = format!("its parent {} is not part of the tree", task.ppid);
            refusals.push(refusal(task.pid, "", why, "wait until the tree has settled, and try again"));
            continue;
        };
        // Its own, its parent's, or the one its parent was born in.
        let birth = tasks.iter().find(|elder| elder.pid == parent.ppid).map_or(root.sid, |elder| elder.sid);
        if task.sid != task.pid && task.sid != parent.sid && !(parent.sid == parent.pid && task.sid == birth) {
            refusals.push(refusal(
                task.pid,
                "",
                format!("it is in session {}, whose leader has ended or is elsewhere in the tree", task.sid),
                "have the program call setsid where it is to stay",
            ));
        }
    }
}

const NAMESPACES: &[&str] = &["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

fn examine_namespaces(target: &dyn Target, refusals: &mut Vec<Refusal>) -> Result<(), DumpError> {
    let pid = target.pid();
    for name in NAMESPACES {
        let path = format!("ns/{name}");
        let theirs = target.proc().link(&path);
        let ours = std::fs::read_link(format!("/proc/self/{path}"));
        match (theirs, ours) {
            (Ok(theirs), Ok(ours)) if theirs != ours.as_os_str() => {
                let help = "run ckpt in the namespaces of the program (nsenter)";
                refusals.push(refusal(pid, &format!("{name} namespace"), "it has a namespace of its own", help));
            }
            // A kernel without this kind of namespace.
            (Err(error), _) | (_, Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {}
            (Err(source), _) | (_, Err(source)) => {
                return Err(DumpError::Io { what: format!("{NAME} of process {pid}: {path}"), source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Threads share everything with their process and processes nothing with each other, or it is refused.
fn examine_sharing(targets: &[Box<dyn Target>], refusals: &mut Vec<Refusal>) -> Result<(), DumpError> {
    let kinds = [
        (Kcmp::Vm, "memory", "wait until its vfork is over"),
        (Kcmp::Files, "the descriptor table", "have the program use fork, not clone(CLONE_FILES)"),
        (Kcmp::Fs, "root, current directory and umask", "have the program use fork, not clone(CLONE_FS)"),
        (Kcmp::Sighand, "signal handlers", "have the program use fork, not clone(CLONE_SIGHAND)"),
    ];
    for (kind, what, help) in kinds {
        // Sorted by kcmp's order: equal ones would meet.
        let mut sorted: Vec<&dyn Target> = Vec::new();
        for target in targets {
            let target = &**target;
            let mut failed = None;
            let place = sorted.binary_search_by(|known| {
                known.compare(kind, 0, target.pid(), 0).unwrap_or_else(|source| {
                    failed = Some(DumpError::Target { resource: NAME, pid: known.pid(), source });
                    std::cmp::Ordering::Less
                })
            });
            if let Some(error) = failed {
                return Err(error);
            }
            match place {
                Ok(known) => {
                    let why = format!("it shares {what} with process {}, which is not supported", sorted[known].pid());
                    refusals.push(refusal(target.pid(), "", why, help));
                }
                Err(place) => sorted.insert(place, target),
            }
            for &tid in &target.threads()[1..] {
                if !matches!(kind, Kcmp::Files | Kcmp::Fs) {
                    break;
                }
                let compared = target.compare(kind, 0, tid, 0);
                let compared =
                    compared.map_err(|source| DumpError::Target { resource: NAME, pid: target.pid(), source })?;
                if compared.is_ne() {
                    let why = format!("it does not share {what} with its process, which is not supported");
                    let help = "have the thread not call unshare";
                    refusals.push(refusal(target.pid(), &format!("thread {tid}"), why, help));
                }
            }
        }
    }
    Ok(())
}

/// Whether every id is free, or need not be, and the session is there.
pub fn check(renames: bool, context: &mut Check<'_>) {
    let image = context.image;
    if image.virtual_ids && !renames {
        context.refuse(
            "",
            "its processes have ids that only the library in them translates: they were restored before when theirs were taken",
            "restore it with --backend preload",
        );
    }
    if image.shell_job && !context.options.shell_job {
        context.refuse(
            "",
            "it is a job of a shell: it was dumped with --shell-job",
            "restore it with --shell-job, from the terminal that it is to have",
        );
    }
    let mut ids: HashSet<Pid> = HashSet::new();
    let live = image.processes.iter().flat_map(|process| process.threads.iter().map(|thread| thread.tid));
    for pid in live.chain(image.zombies.iter().map(|zombie| zombie.task.pid)) {
        if !ids.insert(pid) {
            context.refuse("", format!("process id {pid} is there twice"), "use another copy of the image");
        } else if renames {
            continue;
        } else if let Ok(proc) = ProcDir::open(pid) {
            let name = proc.stat_line().map(|stat| String::from_utf8_lossy(&stat.comm).into_owned());
            let zombie = proc.stat_line().is_ok_and(|stat| stat.state == 'Z');
            let help = if zombie {
                "it has ended, and its parent has yet to wait for it"
            } else {
                "end that process, or restore in a pid namespace of its own (unshare --pid --fork --mount-proc)"
            };
            context.refuse("", format!("process id {pid} is in use ({})", name.unwrap_or_default()), help);
        }
    }
}
