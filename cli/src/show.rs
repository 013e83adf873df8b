//! `ckpt show`: what is in an image.
//!
//! Both forms are made from the wire structs, so that a kind of state that is new in the image is shown at once, field
//! by field, and cannot be forgotten here.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use ckpt_core::PAGE_SIZE;
use ckpt_core::Pid;
use ckpt_core::image::{Image, Process, Thread, Zombie};
use ckpt_core::resource::memory::{Mapping, Source, page_bytes};
use ckpt_formats::v1::ImageV1;
use ckpt_formats::wire::Wire;
use serde_json::Value;

use crate::{human, output};

/// Show what is in an image: the tree with its memory, descriptors, sockets, timers, signals and threads
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt show image
  ckpt show image --json | jq '.processes[].task.pid'")]
pub struct Show {
    /// The directory of the image
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Everything that the image says, as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(verb: &Show) -> anyhow::Result<ExitCode> {
    let reader = ckpt_formats::open(&verb.directory)?;
    let json = json(reader.image())?;
    if verb.json {
        output::print(&format!("{}\n", serde_json::to_string_pretty(&json)?));
    } else {
        output::print(&text(reader.image(), &json));
    }
    Ok(ExitCode::SUCCESS)
}

/// The manifest as JSON. Byte strings are text where they are that, and else `hex:...`.
fn json(image: &Image) -> anyhow::Result<Value> {
    Ok(plain(ciborium::Value::serialized(&ImageV1::from_live(image))?))
}

fn plain(value: ciborium::Value) -> Value {
    match value {
        ciborium::Value::Bytes(bytes) => match String::from_utf8(bytes) {
            Ok(text) if !text.contains(|c: char| c.is_control()) => Value::String(text),
            Ok(text) => hexadecimal(text.as_bytes()),
            Err(error) => hexadecimal(error.as_bytes()),
        },
        ciborium::Value::Text(text) => Value::String(text),
        ciborium::Value::Integer(number) => match (u64::try_from(number), i64::try_from(number)) {
            (Ok(number), _) => number.into(),
            (_, Ok(number)) => number.into(),
            _ => Value::String(i128::from(number).to_string()),
        },
        ciborium::Value::Float(number) => number.into(),
        ciborium::Value::Bool(truth) => Value::Bool(truth),
        ciborium::Value::Array(list) => list.into_iter().map(plain).collect(),
        ciborium::Value::Map(pairs) => {
            let name = |key| match plain(key) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Value::Object(pairs.into_iter().map(|(key, value)| (name(key), plain(value))).collect())
        }
        ciborium::Value::Tag(_, inner) => plain(*inner),
        _ => Value::Null,
    }
}

fn hexadecimal(bytes: &[u8]) -> Value {
    let mut text = String::with_capacity(4 + 2 * bytes.len());
    text += "hex:";
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    Value::String(text)
}

fn text(image: &Image, json: &Value) -> String {
    let threads = image.processes.iter().map(|process| process.threads.len()).sum();
    let mut text = format!(
        "{}, {}, {} of memory saved\n",
        human::count(image.processes.len() + image.zombies.len(), "process", "processes"),
        human::count(threads, "thread", "threads"),
        human::size(page_bytes(image))
    );
    let host = &image.host;
    let _ = writeln!(
        text,
        "saved {} on Linux {} ({}) by ckpt {}",
        human::date(host.time),
        host.kernel,
        host.architecture,
        host.ckpt_version
    );
    if image.shell_job {
        text += "a job of a terminal: restore it with --shell-job\n";
    }
    for loss in &image.losses {
        let _ = writeln!(text, "lost, as allowed at the dump: {loss}");
    }
    text.push('\n');
    if let Some(root) = image.processes.first() {
        branch(image, json, root.task.pid, "", "", &mut text);
    }
    let objects = &json["memory_objects"];
    if objects.as_array().is_some_and(|list| !list.is_empty()) {
        text += "\nmemory that processes share\n";
        for (id, object) in image.memory_objects.iter().enumerate() {
            let saved: u64 = object.pages.iter().map(|pages| pages.extent.pages * PAGE_SIZE).sum();
            let kind = describe(&objects[id]["kind"]);
            let _ = writeln!(text, "  #{id}  {kind}  {}, {} saved", human::size(object.size), human::size(saved));
        }
    }
    if json["deleted_files"].as_array().is_some_and(|list| !list.is_empty()) {
        text += "\nfiles that were deleted\n";
        for (id, file) in json["deleted_files"].as_array().into_iter().flatten().enumerate() {
            let _ = writeln!(text, "  #{id}  {}", describe(file));
        }
    }
    if json["locks"].as_array().is_some_and(|list| !list.is_empty()) {
        text += "\nlocks\n";
        for lock in json["locks"].as_array().into_iter().flatten() {
            let _ = writeln!(text, "  {}", describe(lock));
        }
    }
    let system_v = &json["sysvipc"];
    for (kind, title) in [
        ("segments", "System V shared memory segments"),
        ("semaphores", "System V semaphore sets"),
        ("queues", "System V message queues"),
    ] {
        let objects: Vec<&Value> = system_v[kind].as_array().into_iter().flatten().collect();
        if objects.is_empty() {
            continue;
        }
        let _ = writeln!(text, "\n{title}");
        for object in objects {
            let _ = writeln!(text, "  {}", describe(object));
        }
    }
    text
}

/// Draws a process and everything below it. `first` stands before its first line, `rest` before the others.
fn branch(image: &Image, json: &Value, pid: Pid, first: &str, rest: &str, text: &mut String) {
    if let Some(zombie) = image.zombies.iter().find(|zombie| zombie.task.pid == pid) {
        let _ = writeln!(text, "{first}{}", ended(zombie));
        return;
    }
    let Some(index) = image.process(pid) else { return };
    let process = &image.processes[index];
    let live = image.processes.iter().skip(1).map(|process| &process.task);
    let ended = image.zombies.iter().map(|zombie| &zombie.task);
    let children: Vec<Pid> = live.chain(ended).filter(|task| task.ppid == pid).map(|task| task.pid).collect();

    let _ = writeln!(text, "{first}{}", heading(process));
    let bar = if children.is_empty() { " " } else { "│" };
    for line in details(image, process, &json["processes"][index], json) {
        let _ = writeln!(text, "{rest}{bar}  {line}");
    }
    for (number, child) in children.iter().enumerate() {
        let last = number + 1 == children.len();
        let (fork, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        branch(image, json, *child, &format!("{rest}{fork}"), &format!("{rest}{below}"), text);
    }
}

fn heading(process: &Process) -> String {
    let task = &process.task;
    let mut line = format!("{} {}", task.pid, String::from_utf8_lossy(&task.comm));
    if task.pgid != task.pid || task.sid != task.pid {
        let _ = write!(line, "  (group {}, session {})", task.pgid, task.sid);
    }
    if process.stopped {
        line += "  stopped";
    }
    line
}

fn ended(zombie: &Zombie) -> String {
    let how = match zombie.status & 0x7f {
        0 => format!("exit code {}", zombie.status >> 8 & 0xff),
        signal => format!("signal {signal}"),
    };
    format!("{} {}  ended with {how}, not waited for yet", zombie.task.pid, String::from_utf8_lossy(&zombie.task.comm))
}

fn details(image: &Image, process: &Process, json: &Value, whole: &Value) -> Vec<String> {
    let deleted = if process.memory.exe_deleted.is_some() { " (deleted)" } else { "" };
    let mut lines = vec![format!("exe {}{deleted}", process.memory.exe.display())];
    memory(process, &mut lines);
    if !process.descriptors.descriptors.is_empty() {
        lines.push("descriptors".into());
    }
    for held in &process.descriptors.descriptors {
        let id = held.file.0 as usize;
        let file = &image.files[id];
        let shared = holders(image, held.file.0) > 1;
        lines.push(format!(
            "  {:<3} {:<11} {:<10} {}{}{}",
            held.fd,
            access(file.flags),
            file.kind.name(),
            // the content of the enum's variant
            describe(first_value(&whole["files"][id]["kind"])),
            if held.close_on_exec { ", close-on-exec" } else { "" },
            if shared { format!(", shared as file {id}") } else { String::new() },
        ));
    }
    // Most processes of a tree are alike in these, and most threads: what is as in the first is not said again.
    let root = &whole["processes"][0];
    let is_root = std::ptr::eq(root, json);
    for section in ["filesystem", "signals", "timers", "limits", "attributes", "cgroups"] {
        if is_root || json[section] != root[section] {
            state(section, &json[section], &mut lines);
        }
    }
    for (number, thread) in process.threads.iter().enumerate() {
        lines.push(thread_heading(process, thread));
        for section in ["signals", "credentials", "scheduling", "attributes"] {
            let inner = &json["threads"][number][section];
            if is_root && number == 0 || *inner != root["threads"][0][section] {
                state(&format!("  {section}"), inner, &mut lines);
            }
        }
    }
    lines
}

fn thread_heading(process: &Process, thread: &Thread) -> String {
    let name = String::from_utf8_lossy(&thread.attributes.name);
    let main = if thread.tid == process.task.pid { " (main)" } else { "" };
    let at = thread.context.registers.general.rip;
    let place = process.memory.mappings.iter().find(|mapping| (mapping.start..mapping.end).contains(&at));
    let place = match place.map(|mapping| &mapping.source) {
        Some(Source::File { path, .. }) => format!(" in {}", path.display()),
        Some(Source::Vdso) => " in the vdso".into(),
        _ => String::new(),
    };
    format!("thread {} {name}{main} at {at:#x}{place}", thread.tid)
}

/// Mappings by kind: number, size, saved size.
fn memory(process: &Process, lines: &mut Vec<String>) {
    let kinds = ["program and libraries", "heap", "stack", "anonymous", "files", "shared files", "shared", "kernel"];
    let mut sums = vec![(0usize, 0u64, 0u64); kinds.len()];
    for mapping in &process.memory.mappings {
        let sum = &mut sums[kind_of(process, mapping)];
        sum.0 += 1;
        sum.1 += mapping.end - mapping.start;
        sum.2 += mapping.pages.iter().map(|pages| pages.extent.pages * PAGE_SIZE).sum::<u64>();
    }
    lines.push("memory                    mappings        size       saved".into());
    for (kind, (number, size, saved)) in kinds.iter().zip(sums) {
        if number > 0 {
            lines.push(format!("  {kind:<22} {number:>9} {:>11} {:>11}", human::size(size), human::size(saved)));
        }
    }
    let guards = guard_pages(process);
    if guards > 0 {
        lines.push(format!("  {:<22} {:>9} {:>11}", "guard pages", "", human::size(guards * PAGE_SIZE)));
    }
}

/// How many pages of a process are guard pages.
fn guard_pages(process: &Process) -> u64 {
    process.memory.mappings.iter().flat_map(|mapping| &mapping.guards).map(|run| run.pages).sum()
}

fn kind_of(process: &Process, mapping: &Mapping) -> usize {
    let layout = &process.memory.layout;
    match &mapping.source {
        Source::File { .. } if mapping.shared => 5,
        Source::File { path, .. } => {
            // What has executable code mapped somewhere.
            let code = process.memory.mappings.iter().any(|other| {
                other.protection & libc::PROT_EXEC != 0
                    && matches!(&other.source, Source::File { path: same, .. } if same == path)
            });
            if code { 0 } else { 4 }
        }
        Source::Anonymous if mapping.start < layout.brk && mapping.end > layout.start_brk => 1,
        Source::Anonymous if (mapping.start..mapping.end).contains(&layout.start_stack) => 2,
        Source::Anonymous => 3,
        Source::Vdso | Source::Vvar => 7,
        // Shared memory objects, and files without a name.
        _ => 6,
    }
}

fn access(flags: i32) -> &'static str {
    if flags & libc::O_PATH != 0 {
        return "path";
    }
    match flags & libc::O_ACCMODE {
        libc::O_RDONLY => "read",
        libc::O_WRONLY => "write",
        _ => "read-write",
    }
}

fn holders(image: &Image, file: u32) -> usize {
    let all = image.processes.iter().flat_map(|process| &process.descriptors.descriptors);
    all.filter(|held| held.file.0 == file).count()
}

/// A section in a line, if there is anything to say.
fn state(name: &str, value: &Value, lines: &mut Vec<String>) {
    let Value::Object(fields) = value else { return };
    let said: Vec<String> = fields.iter().filter_map(|(field, value)| said(field, value)).collect();
    if said.is_empty() {
        return;
    }
    let mut line = name.to_string();
    for part in said {
        if line.len() + part.len() > 110 && line.len() > name.len() {
            lines.push(std::mem::replace(&mut line, " ".repeat(name.len())));
        }
        line += if line.trim().is_empty() || line == name { "  " } else { ", " };
        line += &part;
    }
    lines.push(line);
}

/// The content of an enum's variant.
fn first_value(value: &Value) -> &Value {
    match value {
        Value::Object(pairs) if pairs.len() == 1 => pairs.values().next().unwrap_or(value),
        _ => value,
    }
}

/// A variant with content: its name and that.
fn variant(fields: &serde_json::Map<String, Value>) -> Option<(&str, &Value)> {
    let (name, content) = fields.iter().next()?;
    (fields.len() == 1 && name.starts_with(char::is_uppercase)).then_some((name, content))
}

/// A value in words: what is zero, false or empty is left out.
fn describe(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            if let Some((name, content)) = variant(fields) {
                let content = describe(content);
                // A path says itself what it is.
                return if content.starts_with('/') { content } else { format!("{} {content}", words(name)) };
            }
            let mut said: Vec<String> = Vec::new();
            for (field, value) in fields {
                match (field.as_str(), value) {
                    // What it is called comes first, and needs no word before it.
                    ("path" | "name", Value::String(text)) if !text.is_empty() => said.insert(0, text.clone()),
                    ("place", Value::Object(_)) => said.insert(0, describe(value)),
                    _ => said.extend(self::said(field, value)),
                }
            }
            said.join(", ")
        }
        Value::Array(list) if list.len() > 8 => format!("{} entries", list.len()),
        Value::Array(list) => {
            let list: Vec<String> = list.iter().map(describe).collect();
            format!("[{}]", list.join("; "))
        }
        Value::String(text) if text.starts_with("hex:") && text.len() > 36 => format!("{} bytes", (text.len() - 4) / 2),
        Value::String(text) if text.len() > 100 => format!("{} bytes", text.len()),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `close_on_exec` or `Listening` as a person writes it.
fn words(name: &str) -> String {
    name.replace('_', " ").to_lowercase()
}

/// Fields that say nothing in almost every program, with the value that they have there.
const USUAL: [(&str, u64); 4] =
    [("timer_slack", 50_000), ("core_dump_filter", 0x33), ("dumpable", 1), ("file_type", libc::S_IFREG as u64)];

/// A field in words, unless it says nothing.
fn said(field: &str, value: &Value) -> Option<String> {
    let name = words(field);
    let number = value.as_u64();
    if USUAL.iter().any(|(usual, at)| *usual == field && Some(*at) == number) {
        return None;
    }
    match (field, value) {
        // Only a restore wants to know.
        ("identity" | "restorer" | "clear_child_tid" | "robust_list" | "runtime" | "domain", _) => None,
        // Said elsewhere: in the path, in the heading of the thread.
        ("major" | "minor" | "name", _) => None,
        ("cpuid" | "time_stamp_counter", Value::Bool(true)) => None,
        ("actions", Value::Array(actions)) => reactions(actions),
        ("limits", Value::Array(limits)) => Some(bounds(limits)).filter(|text| !text.is_empty()),
        ("umask" | "mode", _) if field == "umask" || number? > 0 => Some(format!("{name} {:03o}", number?)),
        // The end of the pipe that has its content.
        ("first", _) => Some(format!("pipe {}", number?)),
        ("buffer", Value::Object(buffer)) => {
            let parts = buffer.get("data").and_then(Value::as_array);
            let bytes: usize = parts.into_iter().flatten().map(|part| length(&part["bytes"])).sum();
            let size = buffer.get("size").and_then(Value::as_u64).unwrap_or(0);
            Some(format!("{} of {} full", human::size(bytes as u64), human::size(size)))
        }
        ("local" | "remote", Value::Array(_)) => socket_address(value).map(|address| format!("{name} {address}")),
        ("protocol", _) => match number? {
            6 => Some("TCP".into()),
            17 => Some("UDP".into()),
            other => Some(format!("protocol {other}")),
        },
        ("address", Value::Number(_)) => Some(format!("{name} {:#x}", number?)),
        ("intervals", Value::Array(intervals)) => {
            let names = ["real", "virtual", "prof"];
            let running = names.iter().zip(intervals).filter(|(_, timer)| timer["remaining"].as_u64() != Some(0));
            let said: Vec<String> = running.map(|(name, timer)| format!("{name} ({})", describe(timer))).collect();
            (!said.is_empty()).then(|| said.join(", "))
        }
        ("remaining" | "period" | "interval", Value::Number(_)) if number? > 0 => {
            Some(format!("{name} {}", human::duration(std::time::Duration::from_nanos(number?))))
        }
        ("blocked" | "mask" | "signals", Value::Number(_)) if number? > 0 => {
            let all = (1..=64).filter(|signal| number.unwrap_or(0) >> (signal - 1) & 1 == 1);
            Some(format!("{name} {}", all.map(signal_name).collect::<Vec<_>>().join(" ")))
        }
        (
            "bounding" | "effective" | "permitted" | "inheritable" | "ambient" | "handler" | "personality"
            | "securebits",
            Value::Number(_),
        ) if number? > 0 => Some(format!("{name} {:#x}", number?)),
        (_, Value::Null | Value::Bool(false)) => None,
        (_, Value::Bool(true)) => Some(name),
        (_, Value::Number(_)) if number == Some(0) => None,
        (_, Value::Array(list)) if list.iter().all(Value::is_null) => None,
        (_, Value::String(text)) if text.is_empty() || text == "hex:" => None,
        (_, Value::String(text))
            if text.strip_prefix("hex:").is_some_and(|rest| rest.bytes().all(|byte| byte == b'0')) =>
        {
            None
        }
        (_, Value::Object(_) | Value::Array(_)) => {
            let inner = describe(value);
            if inner.starts_with('/') {
                return Some(format!("{name} {inner}"));
            }
            (!inner.is_empty()).then(|| format!("{name} ({inner})"))
        }
        _ => Some(format!("{name} {}", describe(value))),
    }
}

/// Bytes of a byte string.
fn length(value: &Value) -> usize {
    let text = value.as_str().unwrap_or("");
    text.strip_prefix("hex:").map_or(text.len(), |digits| digits.len() / 2)
}

/// `[address, port, flow label, scope]`.
fn socket_address(value: &Value) -> Option<std::net::SocketAddr> {
    let text = value.get(0)?.as_str()?;
    let bytes: Vec<u8> = match text.strip_prefix("hex:") {
        Some(digits) => (0..digits.len() / 2)
            .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16))
            .collect::<Result<_, _>>()
            .ok()?,
        None => text.as_bytes().to_vec(),
    };
    let address = match (<[u8; 4]>::try_from(bytes.as_slice()), <[u8; 16]>::try_from(bytes.as_slice())) {
        (Ok(bytes), _) => std::net::IpAddr::from(bytes),
        (_, Ok(bytes)) => std::net::IpAddr::from(bytes),
        _ => return None,
    };
    Some((address, value.get(1)?.as_u64()?.try_into().ok()?).into())
}

/// Signals by what becomes of them.
fn reactions(actions: &[Value]) -> Option<String> {
    let named = |ignored: bool| {
        let chosen = actions.iter().filter(|action| (action["handler"].as_u64() == Some(1)) == ignored);
        let names: Vec<String> = chosen.filter_map(|action| Some(signal_name(action["signal"].as_u64()?))).collect();
        names.join(" ")
    };
    let (caught, ignored) = (named(false), named(true));
    let said: Vec<String> = [("caught", caught), ("ignored", ignored)]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| format!("{what} {names}"))
        .collect();
    (!said.is_empty()).then(|| said.join(", "))
}

fn signal_name(number: u64) -> String {
    match i32::try_from(number).ok().and_then(|number| nix::sys::signal::Signal::try_from(number).ok()) {
        Some(signal) => signal.as_str().trim_start_matches("SIG").to_string(),
        None => number.to_string(),
    }
}

/// The limits that are limits, in the order of `RLIMIT_*` (asm-generic/resource.h).
fn bounds(limits: &[Value]) -> String {
    const NAMES: [&str; 16] = [
        "cpu",
        "fsize",
        "data",
        "stack",
        "core",
        "rss",
        "nproc",
        "nofile",
        "memlock",
        "as",
        "locks",
        "sigpending",
        "msgqueue",
        "nice",
        "rtprio",
        "rttime",
    ];
    let text = |value: &Value| match value.as_u64() {
        Some(u64::MAX) => "unlimited".to_string(),
        other => other.unwrap_or(0).to_string(),
    };
    let limited = NAMES.iter().zip(limits).filter(|(_, limit)| limit["soft"].as_u64() != Some(u64::MAX));
    let said: Vec<String> = limited
        .map(|(name, limit)| {
            let (soft, hard) = (text(&limit["soft"]), text(&limit["hard"]));
            if soft == hard { format!("{name} {soft}") } else { format!("{name} {soft} of {hard}") }
        })
        .collect();
    said.join(", ")
}
