//! SPEC.md and SPEC-v1.cddl say what the wire structs are; nobody changes v1 by accident.
//!
//! `CKPT_UPDATE=1 cargo test -p ckpt-formats` writes both anew, until v1 is released.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Set to true with the release of v1. Then what these tests find is a mistake, and no variable makes it right.
const RELEASED: bool = false;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn updating() -> bool {
    !RELEASED && std::env::var_os("CKPT_UPDATE").is_some()
}

/// Compares a file, or the part between two marks of it, with what it should be.
fn same(path: &str, marks: Option<(&str, &str)>, expected: &str) {
    let path = here(path);
    let text = fs::read_to_string(&path).unwrap_or_default();
    let (start, end) = match marks {
        Some((begin, end)) => {
            let start = text.find(begin).expect("the first mark") + begin.len();
            (start, start + text[start..].find(end).expect("the second mark"))
        }
        None => (0, text.len()),
    };
    if text[start..end] == *expected {
        return;
    }
    if updating() {
        fs::write(&path, [&text[..start], expected, &text[end..]].concat()).unwrap();
        return;
    }
    let differing = text[start..end].lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    panic!(
        "{} is not what the wire structs are, first at {differing:?}; format v1 has changed. Until its release \
         `CKPT_UPDATE=1 cargo test -p ckpt-formats` makes it right; afterwards a change needs a v2",
        path.display()
    );
}

/// The files of `src/v1`, by kind, `mod` first.
fn sources() -> Vec<(String, String)> {
    let mut sources: Vec<_> = fs::read_dir(here("src/v1"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_string(), fs::read_to_string(&path).unwrap()))
        .collect();
    sources.sort_by_key(|(kind, _)| (kind != "mod", kind.clone()));
    sources
}

#[test]
fn the_hash_of_every_wire_file_is_in_the_spec() {
    let mut table = String::from("\n| file | CRC-32C |\n|---|---|\n");
    for (kind, source) in sources() {
        writeln!(table, "| `src/v1/{kind}.rs` | `{:08x}` |", crc32c::crc32c(source.as_bytes())).unwrap();
    }
    same("SPEC.md", Some(("<!-- hashes -->\n", "<!-- end of hashes -->")), &table);
}

#[test]
fn the_schema_says_what_the_wire_structs_are() {
    let schema = Schema::read();
    same("SPEC-v1.cddl", None, &schema.text());
}

// --- the schema, read off the sources ---

/// What core says of a type or field.
#[derive(Clone, Default)]
struct Live {
    docs: Vec<String>,
    /// Of a field.
    kind: String,
}

/// A struct or enum of the wire.
struct Rule {
    kind: String,
    /// `PipeV1`.
    name: String,
    docs: Vec<String>,
    /// The path of the live type, where a macro declares both.
    live: Option<String>,
    content: Content,
}

enum Content {
    Map(Vec<Member>),
    Array(Vec<String>),
    Variants(Vec<Variant>),
}

struct Member {
    docs: Vec<String>,
    name: String,
    kind: String,
}

struct Variant {
    name: String,
    inner: Option<String>,
    members: Vec<Member>,
}

struct Schema {
    rules: Vec<Rule>,
    /// Of live types, by `module` and `Type` or `Type.field`.
    live: BTreeMap<(String, String), Live>,
}

impl Schema {
    fn read() -> Schema {
        let mut rules = Vec::new();
        for (kind, source) in sources() {
            rules.extend(rules_of(&kind, &source));
        }
        let mut live = BTreeMap::new();
        read_folder(&here("../core/src"), &mut live);
        Schema { rules, live }
    }

    fn text(&self) -> String {
        let mut text = String::from(
            "; The manifest of format version 1, in CDDL (RFC 8610). Made from the sources: see tests/spec.rs.\n\
             ; A rule is named after its kind of state. SPEC.md says what stands around the manifest.\n\n",
        );
        for bits in [8, 16, 32, 64] {
            writeln!(text, "uint{bits} = 0..{}", u64::MAX >> (64 - bits)).unwrap();
        }
        for bits in [8, 16, 32, 64] {
            writeln!(text, "int{bits} = {}..{}", i64::MIN >> (64 - bits), i64::MAX >> (64 - bits)).unwrap();
        }
        let mut kind = "";
        for rule in &self.rules {
            if rule.kind != kind {
                kind = &rule.kind;
                let title = if kind == "mod" { "top" } else { kind };
                writeln!(text, "\n; ---- {title} ----").unwrap();
            }
            self.rule(rule, &mut text);
        }
        text
    }

    fn rule(&self, rule: &Rule, text: &mut String) {
        text.push('\n');
        let mut docs = self.live(rule, None).docs;
        docs.extend(rule.docs.iter().filter(|line| !docs.contains(line)).cloned().collect::<Vec<_>>());
        comment(&docs, "", text);
        write!(text, "{} =", rule_name(&rule.kind, &rule.name)).unwrap();
        match &rule.content {
            Content::Map(members) => {
                text.push_str(" {\n");
                self.members(rule, None, members, "  ", text);
                text.push_str("}\n");
            }
            // serde writes a struct of one unnamed field as that field.
            Content::Array(types) if types.len() == 1 => {
                writeln!(text, " {}", self.cddl(&rule.kind, &types[0])).unwrap();
            }
            Content::Array(types) => {
                let types: Vec<_> = types.iter().map(|kind| self.cddl(&rule.kind, kind)).collect();
                writeln!(text, " [{}]", types.join(", ")).unwrap();
            }
            Content::Variants(variants) => {
                text.push('\n');
                for (number, variant) in variants.iter().enumerate() {
                    comment(&self.live(rule, Some(&variant.name)).docs, "  ", text);
                    text.push_str(if number == 0 { "    " } else { "  / " });
                    let name = &variant.name;
                    match (&variant.inner, &variant.members[..]) {
                        (Some(inner), _) => {
                            writeln!(text, "{{ \"{name}\": {} }}", self.cddl(&rule.kind, inner)).unwrap();
                        }
                        (None, []) => writeln!(text, "\"{name}\"").unwrap(),
                        (None, members) => {
                            writeln!(text, "{{ \"{name}\": {{").unwrap();
                            self.members(rule, Some(name), members, "      ", text);
                            text.push_str("    } }\n");
                        }
                    }
                }
            }
        }
    }

    fn members(&self, rule: &Rule, variant: Option<&str>, members: &[Member], indent: &str, text: &mut String) {
        for member in members {
            let path = variant.map_or(member.name.clone(), |variant| format!("{variant}.{}", member.name));
            let Live { mut docs, kind } = self.live(rule, Some(&path));
            docs.extend(member.docs.iter().cloned());
            comment(&docs, indent, text);
            let mut cddl = self.cddl(&rule.kind, &member.kind);
            // What the live type says more than the wire type.
            if let Some((_, length)) = kind.replace("SigInfo", "[u8; 128]").split_once("[u8; ")
                && let Ok(length) = length.split(']').next().unwrap().parse::<usize>()
            {
                cddl = cddl.replace("bstr", &format!("bstr .size {length}"));
            }
            let list = [("FileId", "files"), ("ObjectId", "memory_objects"), ("DeletedId", "deleted_files")]
                .map(|(id, list)| (id, format!("Image.{list}")));
            let list = list.iter().find(|(id, _)| kind.contains(id)).map(|(_, list)| list.as_str());
            let list = list.or(kind.contains("BlobId").then_some("Manifest.blobs"));
            let note = list.map(|list| format!(" ; index in {list}")).unwrap_or_default();
            writeln!(text, "{indent}{}: {cddl},{note}", member.name).unwrap();
        }
    }

    fn live(&self, rule: &Rule, part: Option<&str>) -> Live {
        let Some(live) = &rule.live else { return Live::default() };
        let parts: Vec<_> = live.split("::").collect();
        let (name, module) = (parts[parts.len() - 1], parts[parts.len() - 2]);
        // What core re-exports at its top is declared in these.
        let modules = if module == "ckpt_core" { vec!["target", "image"] } else { vec![module] };
        let path = part.map_or(name.to_string(), |part| format!("{name}.{part}"));
        modules
            .iter()
            .find_map(|module| self.live.get(&(module.to_string(), path.clone())))
            .cloned()
            .unwrap_or_default()
    }

    /// A type of the wire in CDDL.
    fn cddl(&self, kind: &str, wire: &str) -> String {
        let wire = wire.trim();
        let inside = |prefix: &str| wire.strip_prefix(prefix).and_then(|rest| rest.strip_suffix('>'));
        match wire {
            "bool" => "bool".into(),
            "u8" | "u16" | "u32" | "u64" => format!("uint{}", &wire[1..]),
            "i8" | "i16" | "i32" | "i64" => format!("int{}", &wire[1..]),
            "String" => "tstr".into(),
            "Bytes" => "bstr".into(),
            _ => {
                if let Some(inner) = inside("Option<") {
                    return format!("{} / null", self.cddl(kind, inner));
                }
                if let Some(inner) = inside("Vec<") {
                    return format!("[* {}]", self.in_group(kind, inner));
                }
                if let Some(inner) = wire.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')) {
                    let types: Vec<_> = split(inner, ',').iter().map(|kind_of| self.cddl(kind, kind_of)).collect();
                    return format!("[{}]", types.join(", "));
                }
                if let Some((inner, length)) = wire
                    .strip_prefix('[')
                    .and_then(|rest| rest.strip_suffix(']'))
                    .and_then(|inner| inner.rsplit_once(';'))
                {
                    let length = length.trim();
                    return format!("[{length}*{length} {}]", self.in_group(kind, inner));
                }
                self.reference(kind, wire)
            }
        }
    }

    fn in_group(&self, kind: &str, wire: &str) -> String {
        let cddl = self.cddl(kind, wire);
        if cddl.contains(" / ") { format!("({cddl})") } else { cddl }
    }

    /// `IdentityV1` or `files::IdentityV1`, as seen from a kind's file.
    fn reference(&self, kind: &str, wire: &str) -> String {
        let (module, name) = wire.rsplit_once("::").unwrap_or((kind, wire));
        let module = module.rsplit("::").next().unwrap();
        let all: Vec<_> = self.rules.iter().filter(|rule| rule.name == name).collect();
        match all.iter().find(|rule| rule.kind == module) {
            Some(rule) => rule_name(&rule.kind, name),
            None if all.len() == 1 => rule_name(&all[0].kind, name),
            None => panic!("{wire} in {kind}.rs: write it with its module, so that one can tell which it is"),
        }
    }
}

fn rule_name(kind: &str, name: &str) -> String {
    let name = name.strip_suffix("V1").expect("a wire struct's name ends in V1");
    if kind == "mod" { name.to_string() } else { format!("{kind}.{name}") }
}

fn comment(docs: &[String], indent: &str, text: &mut String) {
    for line in docs {
        let plain = plain(line);
        writeln!(text, "{indent};{}{plain}", if plain.is_empty() { "" } else { " " }).unwrap();
    }
}

/// Without the marks of a link: `` [`Target`](crate::Target) ``.
fn plain(line: &str) -> String {
    let mut plain = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once('[') {
        plain.push_str(before);
        match after.split_once(']') {
            Some((inner, after)) if inner.starts_with('`') => {
                plain.push_str(inner);
                rest = match after.strip_prefix('(').and_then(|after| after.split_once(')')) {
                    Some((_, after)) => after,
                    None => after,
                };
            }
            _ => {
                plain.push('[');
                rest = after;
            }
        }
    }
    plain + rest
}

/// The rules of one file, in their order.
fn rules_of(kind: &str, source: &str) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut docs = Vec::new();
    let mut lines = source.lines().peekable();
    while let Some(line) = lines.next() {
        let trimmed = line.trim();
        if let Some(doc) = trimmed.strip_prefix("///") {
            docs.push(doc.trim().to_string());
            continue;
        }
        if trimmed.starts_with("#[") {
            continue;
        }
        let declared = trimmed.strip_prefix("pub struct ").map(|rest| (rest, false));
        let Some((rest, is_enum)) = declared.or(trimmed.strip_prefix("pub enum ").map(|rest| (rest, true))) else {
            docs.clear();
            continue;
        };
        // The whole declaration, up to its closing bracket.
        let mut text = rest.to_string();
        while !is_closed(&text) {
            text.push('\n');
            text.push_str(lines.next().expect("a declaration ends").trim());
        }
        let docs = std::mem::take(&mut docs);
        let open = text.find(['{', '(']).expect("a body");
        let head = text[..open].trim();
        let (name, live) = match head.split_once(" for ") {
            Some((name, live)) => (name, Some(live.trim().to_string())),
            None => (head, None),
        };
        let close = text.rfind(['}', ')']).expect("a closed body");
        let body = &text[open + 1..close];
        let content = match (is_enum, text.as_bytes()[open]) {
            (true, _) => Content::Variants(split(body, ',').iter().map(|variant| variant_of(variant)).collect()),
            (false, b'{') => Content::Map(split(body, ',').iter().map(|member| member_of(member)).collect()),
            (false, _) => Content::Array(
                split(body, ',').iter().map(|field| field.trim().trim_start_matches("pub ").to_string()).collect(),
            ),
        };
        rules.push(Rule { kind: kind.into(), name: name.trim().into(), docs, live, content });
    }
    rules
}

fn is_closed(text: &str) -> bool {
    let without_docs: String = text.lines().filter(|line| !line.starts_with("//")).collect();
    let count = |brackets: [char; 2]| without_docs.matches(brackets).count();
    let (open, closed) = (count(['{', '(']), count(['}', ')']));
    open > 0 && open == closed
}

/// Splits at the top level, and drops what is empty. Documentation stays with what follows it.
fn split(text: &str, at: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut depth = 0;
    for line in text.lines() {
        let is_doc = line.trim().starts_with("//");
        for character in line.chars() {
            match character {
                _ if is_doc => {}
                '{' | '(' | '[' | '<' => depth += 1,
                '}' | ')' | ']' | '>' => depth -= 1,
                _ if character == at && depth == 0 => {
                    parts.push(String::new());
                    continue;
                }
                _ => {}
            }
            parts.last_mut().unwrap().push(character);
        }
        parts.last_mut().unwrap().push('\n');
    }
    parts.retain(|part| !part.trim().is_empty());
    parts
}

/// Documentation lines, and the rest in one line.
fn docs_and_rest(text: &str) -> (Vec<String>, String) {
    let (docs, rest): (Vec<_>, Vec<_>) = text.trim().lines().map(str::trim).partition(|line| line.starts_with("//"));
    let docs = docs.iter().map(|line| line.trim_start_matches('/').trim().to_string()).collect();
    let rest: Vec<_> = rest.into_iter().filter(|line| !line.starts_with("#[")).collect();
    (docs, rest.join(" "))
}

fn member_of(text: &str) -> Member {
    let (docs, rest) = docs_and_rest(text);
    let (name, kind) = rest.split_once(':').unwrap_or_else(|| panic!("{rest:?} is not a field"));
    Member { docs, name: name.trim().trim_start_matches("pub ").to_string(), kind: kind.trim().to_string() }
}

fn variant_of(text: &str) -> Variant {
    let (_, rest) = docs_and_rest(text);
    let end = rest.find(['{', '(']).unwrap_or(rest.len());
    let name = rest[..end].trim().to_string();
    let body = rest[end..].trim();
    let inner = body.strip_prefix('(').and_then(|body| body.strip_suffix(')')).map(|inner| inner.trim().to_string());
    let body = body.strip_prefix('{').and_then(|body| body.strip_suffix('}')).unwrap_or("");
    Variant { name, inner, members: split(body, ',').iter().map(|member| member_of(member)).collect() }
}

/// Reads a folder of core. What a folder's files declare is found under the folder's name too, as it is re-exported.
fn read_folder(folder: &Path, live: &mut BTreeMap<(String, String), Live>) {
    let name = folder.file_name().unwrap().to_str().unwrap();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_folder(&path, live);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            for module in [path.file_stem().unwrap().to_str().unwrap(), name] {
                read_live(module, &source, live);
            }
        }
    }
}

/// The types of a module of core, and their fields.
fn read_live(module: &str, source: &str, all: &mut BTreeMap<(String, String), Live>) {
    let mut docs = Vec::new();
    // The type, and in an enum the variant, that we are in.
    let mut path: Vec<String> = Vec::new();
    let mut is_enum = false;
    for line in source.lines() {
        let trimmed = line.trim();
        if let Some(doc) = trimmed.strip_prefix("///") {
            docs.push(doc.trim().to_string());
            continue;
        }
        if trimmed.starts_with("#[") {
            continue;
        }
        let docs = std::mem::take(&mut docs);
        let word = |text: &str| text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_string();
        if path.is_empty() {
            let declared = trimmed.strip_prefix("pub struct ").map(|rest| (rest, false));
            if let Some((rest, of_enum)) = declared.or(trimmed.strip_prefix("pub enum ").map(|rest| (rest, true))) {
                all.insert((module.into(), word(rest)), Live { docs, kind: String::new() });
                if line.trim_end().ends_with('{') {
                    path = vec![word(rest)];
                    is_enum = of_enum;
                }
            }
        } else if trimmed.starts_with('}') {
            path.pop();
        } else {
            let name = word(trimmed.trim_start_matches("pub "));
            if !name.is_empty() {
                let full = [&path[..], std::slice::from_ref(&name)].concat().join(".");
                let kind = trimmed.split_once(':').map_or("", |(_, kind)| kind).trim().to_string();
                all.insert((module.into(), full), Live { docs, kind });
            }
            if is_enum && trimmed.ends_with('{') {
                path.push(name);
            }
        }
    }
}
