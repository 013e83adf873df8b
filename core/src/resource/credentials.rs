//! User and group ids, supplementary groups, capabilities, securebits and `no_new_privs`, of each thread.
//!
//! The kernel keeps them by thread (`pthread` libraries keep them alike), and the raw calls change one thread. A
//! skeleton begins with ckpt's own; a thread that had the same needs no call.
//!
//! Refused: a label of a security module (SELinux, AppArmor) other than ckpt's own. Cannot be seen, and so not kept:
//! keyrings, Landlock rules, the audit ids (`/proc/PID/loginuid`).

use crate::args;
use crate::batch::{Batch, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::ourselves::{Capability, capability_names, ourselves, security_label};
use crate::procfs::Status;
use crate::resource::threads::Answers;
use crate::resource::{Check, Collect, OfThread, Rebuild, Resource};

/// The credentials of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    pub uid: Ids,
    pub gid: Ids,
    /// Supplementary groups, as the kernel has them: sorted.
    pub groups: Vec<u32>,
    /// Capability sets, bit `n` for capability `n`.
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    /// `SECBIT_*`.
    pub securebits: u32,
    pub no_new_privs: bool,
}

/// Ids of users or groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    pub real: u32,
    pub effective: u32,
    pub saved: u32,
    pub filesystem: u32,
}

const PR_SET_KEEPCAPS: i32 = 8;
const PR_CAPBSET_DROP: i32 = 24;
const PR_SET_SECUREBITS: i32 = 28;
const PR_SET_NO_NEW_PRIVS: i32 = 38;
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: i32 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: i32 = 4;
const SECBIT_KEEP_CAPS: u32 = 1 << 4;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// `NGROUPS_MAX`.
const MOST_GROUPS: usize = 65_536;

impl Credentials {
    fn read(answers: &Answers) -> Option<Credentials> {
        Credentials::parse(&answers.status, answers.securebits)
    }

    fn parse(status: &Status, securebits: u32) -> Option<Credentials> {
        let ids = |name: &str| {
            let numbers = status.field(name)?.split_ascii_whitespace().map(|word| word.parse().ok());
            let numbers: Option<Vec<u32>> = numbers.collect();
            match numbers?[..] {
                [real, effective, saved, filesystem] => Some(Ids { real, effective, saved, filesystem }),
                _ => None,
            }
        };
        Some(Credentials {
            uid: ids("Uid")?,
            gid: ids("Gid")?,
            groups: status.field("Groups")?.split_whitespace().map(|id| id.parse().ok()).collect::<Option<_>>()?,
            inheritable: status.mask("CapInh")?,
            permitted: status.mask("CapPrm")?,
            effective: status.mask("CapEff")?,
            bounding: status.mask("CapBnd")?,
            ambient: status.mask("CapAmb")?,
            securebits,
            no_new_privs: status.field("NoNewPrivs")? != "0",
        })
    }
}

/// Ids and privileges.
pub struct ThreadCredentials;

impl Resource for ThreadCredentials {
    const NAME: &'static str = "credentials";
    type Scope = OfThread;
    type Saved = Credentials;

    fn collect(context: &mut Collect<'_>) -> Result<Credentials, DumpError> {
        if context.thread == 0 {
            let label = security_label(context.target.proc());
            if label != ourselves().security_label {
                context.refuse(
                    "security label",
                    format!("it is {}, which cannot be given to a restored process", label.escape_ascii()),
                    "run ckpt with the same label",
                );
            }
        }
        Credentials::read(context.answers()).ok_or_else(|| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "ids or capabilities are missing");
            context.io_error("/proc/PID/status", source)
        })
    }

    fn check(saved: &Credentials, context: &mut Check<'_>) {
        let Some(ours) = Credentials::parse(&ourselves().status, saved.securebits) else {
            context.refuse("", "ckpt's own credentials cannot be read", "");
            return;
        };
        if saved.groups.len() > MOST_GROUPS || saved.ambient & !(saved.permitted & saved.inheritable) != 0 {
            context.refuse("", "they are impossible", "the image is damaged");
            return;
        }
        for (what, lacking) in lacking(saved, &ours) {
            context.refuse(what.0, what.1, format!("restore with {}", capability_names(lacking)));
        }
        if ours.no_new_privs && !saved.no_new_privs {
            context.refuse("no_new_privs", "ckpt has it set and the process had not", "restore from another shell");
        }
    }

    fn rebuild(saved: &Credentials, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        let initial = Credentials::read(context.initial)
            .ok_or_else(|| context.mismatch("the skeleton's credentials cannot be read"))?;
        if *saved == initial {
            return Ok(());
        }
        let mut batch = Batch::new();
        change(&initial, saved, &mut batch);
        context.run(&batch)?;
        // setfsuid and setfsgid do not say when they fail, and there is much that could be a little wrong.
        let tid = context.target.threads()[context.thread];
        let status = context.target.proc().thread_status(tid);
        let now = status.ok().and_then(|status| Credentials::parse(&status, saved.securebits));
        if now.as_ref() != Some(saved) {
            return Err(context.mismatch(format!("thread {tid} was to have {saved:?} and has {now:?}")));
        }
        Ok(())
    }
}

/// What could not be given, coming from `ours`, and the capabilities that would help.
fn lacking(saved: &Credentials, ours: &Credentials) -> Vec<((&'static str, String), u64)> {
    let mut lacking = Vec::new();
    let bit = |capability: Capability| 1u64 << capability.0;
    let may = |capability: Capability| capability.is_in(ours.effective);
    let held = |ids: &Ids, ours: &Ids| {
        let had = [ours.real, ours.effective, ours.saved];
        [ids.real, ids.effective, ids.saved, ids.filesystem].iter().all(|id| had.contains(id))
    };
    if !held(&saved.uid, &ours.uid) && !may(Capability::SETUID) {
        let what = format!("uid {} of the process is not ours", saved.uid.effective);
        lacking.push((("user ids", what), bit(Capability::SETUID)));
    }
    if (!held(&saved.gid, &ours.gid) || saved.groups != ours.groups) && !may(Capability::SETGID) {
        let what = format!("gid {} or the groups of the process are not ours", saved.gid.effective);
        lacking.push((("group ids", what), bit(Capability::SETGID)));
    }
    let missing = saved.permitted & !ours.permitted;
    if missing != 0 {
        lacking.push((("capabilities", "the process had more than ckpt has".into()), missing));
    }
    let missing = saved.inheritable & !(ours.inheritable | ours.permitted);
    let missing = missing | saved.inheritable & !(ours.inheritable | ours.bounding);
    if missing != 0 {
        lacking.push((("inheritable capabilities", "the process had more than ckpt has".into()), missing));
    }
    let missing = saved.bounding & !ours.bounding;
    if missing != 0 {
        let what = "the bounding set of the process held more than that of ckpt".into();
        lacking.push((("bounding capabilities", what), missing));
    }
    let dropped = ours.bounding & !saved.bounding;
    let secured = saved.securebits & !SECBIT_KEEP_CAPS;
    if (dropped != 0 || secured != 0) && !may(Capability::SETPCAP) {
        let what = "the process had a smaller bounding set or other securebits than ckpt".into();
        lacking.push((("privileges", what), bit(Capability::SETPCAP)));
    }
    lacking
}

/// The calls that lead from `old` to `new`. Each needs privileges that a later one takes away.
fn change(old: &Credentials, new: &Credentials, batch: &mut Batch) {
    // Everything permitted is effective, and what will be inheritable becomes so while it can.
    capset(batch, old.permitted, old.permitted, new.inheritable);
    for capability in (0..64).filter(|&number| Capability(number).is_in(old.bounding & !new.bounding)) {
        batch.call(Sysno::prctl, args![PR_CAPBSET_DROP, capability, 0, 0, 0]);
    }
    if old.ambient != 0 {
        batch.call(Sysno::prctl, args![PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0]);
    }
    if old.groups != new.groups {
        let list: Vec<u8> = new.groups.iter().flat_map(|id| id.to_ne_bytes()).collect();
        let list = batch.bytes(&list);
        batch.call(Sysno::setgroups, args![new.groups.len(), list]);
    }
    if old.gid != new.gid {
        batch.call(Sysno::setresgid, args![new.gid.real, new.gid.effective, new.gid.saved]);
        batch.call(Sysno::setfsgid, args![new.gid.filesystem]);
    }
    let mut keeping = old.securebits & SECBIT_KEEP_CAPS != 0;
    if old.uid != new.uid {
        // Capabilities outlive the change of users, to be set exactly afterwards.
        if !keeping {
            batch.call(Sysno::prctl, args![PR_SET_KEEPCAPS, 1, 0, 0, 0]);
            keeping = true;
        }
        batch.call(Sysno::setresuid, args![new.uid.real, new.uid.effective, new.uid.saved]);
        batch.call(Sysno::setfsuid, args![new.uid.filesystem]);
        capset(batch, old.permitted, old.permitted, new.inheritable);
    }
    for capability in (0..64).filter(|&number| Capability(number).is_in(new.ambient)) {
        batch.call(Sysno::prctl, args![PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0]);
    }
    if (old.securebits ^ new.securebits) & !SECBIT_KEEP_CAPS != 0 {
        batch.call(Sysno::prctl, args![PR_SET_SECUREBITS, new.securebits, 0, 0, 0]);
    } else if keeping != (new.securebits & SECBIT_KEEP_CAPS != 0) {
        batch.call(Sysno::prctl, args![PR_SET_KEEPCAPS, u32::from(!keeping), 0, 0, 0]);
    }
    capset(batch, new.permitted, new.effective, new.inheritable);
    if new.no_new_privs && !old.no_new_privs {
        batch.call(Sysno::prctl, args![PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0]);
    }
}

/// `capset` of this thread.
fn capset(batch: &mut Batch, permitted: u64, effective: u64, inheritable: u64) {
    let header = batch.words(&[u64::from(CAPABILITY_VERSION)]);
    let mut data = Vec::with_capacity(24);
    for shift in [0, 32] {
        for set in [effective, permitted, inheritable] {
            data.extend(((set >> shift) as u32).to_ne_bytes());
        }
    }
    let data = batch.bytes(&data);
    batch.call(Sysno::capset, args![header, data]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Credentials {
        let all = (1 << 41) - 1;
        Credentials { permitted: all, effective: all, bounding: all, ..Credentials::default() }
    }

    fn nobody() -> Credentials {
        let ids = Ids { real: 65534, effective: 65534, saved: 65534, filesystem: 65534 };
        Credentials { uid: ids, gid: ids, bounding: (1 << 41) - 1, ..Credentials::default() }
    }

    #[test]
    fn root_can_give_everything() {
        assert!(lacking(&nobody(), &root()).is_empty());
        assert!(lacking(&root(), &root()).is_empty());
        let small = Credentials { bounding: 1, securebits: 2, ..nobody() };
        assert!(lacking(&small, &root()).is_empty());
    }

    #[test]
    fn an_unprivileged_user_can_only_give_what_is_its_own() {
        assert!(lacking(&nobody(), &nobody()).is_empty());
        let named: Vec<String> =
            lacking(&root(), &nobody()).iter().map(|(_, missing)| capability_names(*missing)).collect();
        assert_eq!(named[..2], ["CAP_SETUID", "CAP_SETGID"]);
        assert!(named[2].contains("CAP_SYS_ADMIN"));
        let smaller = Credentials { bounding: 1, ..nobody() };
        assert_eq!(lacking(&smaller, &nobody()).last().unwrap().1, 1 << Capability::SETPCAP.0);
    }
}
