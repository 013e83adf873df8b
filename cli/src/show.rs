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
    if json["locks"].as_array().is_some_and(|list| !list.is_empty()) {
        text += "\nlocks\n";
        for lock in json["locks"].as_array().into_iter().flatten() {
            let _ = writeln!(text, "  {}", describe(lock));
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
    let mut lines = vec![format!("exe {}", process.memory.exe.display())];
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
    for section in ["filesystem", "signals", "timers", "limits", "attributes"] {
        state(section, &json[section], &mut lines);
    }
    for (number, thread) in process.threads.iter().enumerate() {
        lines.push(thread_heading(process, thread));
        for section in ["signals", "credentials", "scheduling", "attributes"] {
            let inner = &json["threads"][number][section];
            // Most threads are as the main one is in this.
            if number == 0 || *inner != json["threads"][0][section] {
                state(&format!("  {section}"), inner, &mut lines);
            }
        }
    }
    lines
}

fn thread_heading(process: &Process, thread: &Thread) -> String {
    let main = if thread.tid == process.task.pid { " (main)" } else { "" };
    let at = thread.context.registers.general.rip;
    let place = process.memory.mappings.iter().find(|mapping| (mapping.start..mapping.end).contains(&at));
    let place = match place.map(|mapping| &mapping.source) {
        Some(Source::File { path, .. }) => format!(" in {}", path.display()),
        Some(Source::Vdso) => " in the vdso".into(),
        _ => String::new(),
    };
    format!("thread {}{main} at {at:#x}{place}", thread.tid)
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

/// A value in words: what is zero, false or empty is left out.
fn describe(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let mut said: Vec<String> = Vec::new();
            for (field, value) in fields {
                match (field.as_str(), value) {
                    // What it is called comes first, and needs no word before it.
                    ("path" | "name", Value::String(text)) if !text.is_empty() => said.insert(0, text.clone()),
                    // Only a restore wants to know.
                    ("identity", _) => {}
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

fn said(field: &str, value: &Value) -> Option<String> {
    let field = field.replace('_', " ");
    match value {
        Value::Null | Value::Bool(false) => None,
        Value::Bool(true) => Some(field),
        Value::Number(number) if number.as_u64() == Some(0) => None,
        Value::Array(list) if list.is_empty() => None,
        Value::String(text) if text.is_empty() || text == "hex:" => None,
        Value::String(text) if text.strip_prefix("hex:").is_some_and(|rest| rest.bytes().all(|byte| byte == b'0')) => {
            None
        }
        Value::Object(_) | Value::Array(_) => {
            let inner = describe(value);
            (!inner.is_empty()).then(|| format!("{field} ({inner})"))
        }
        _ => Some(format!("{field} {}", describe(value))),
    }
}
