//! Keeps the written rules that a machine can check: sizes, headers, names, import arrows,
//! determinism, licences. It reads the tree as text and runs nothing.
//!
//! Every rule is a function over (path, text), so that the last tests can plant bad text and see
//! the rule say no. It does not parse Rust: brace counting over text without comments and strings
//! is enough for these rules.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 70;
const LINE_COLUMNS_MAX: usize = 100;
const CRATES: [&str; 5] = ["engine", "formats", "jobs", "exports", "control"];
const FOLDERS_WITHOUT_NOUN: [&str; 6] = ["util", "utils", "common", "misc", "base", "helpers"];
const LICENSE: &str = "MIT OR Apache-2.0";

/// One broken rule: where, and what.
type Finding = String;

struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Tests, benches, examples and fuzz targets: no limit on the length of a function.
    fn is_product(&self) -> bool {
        let in_folder = |name: &str| {
            self.path.starts_with(&format!("{name}/")) || self.path.contains(&format!("/{name}/"))
        };
        !["tests", "benches", "bench", "examples", "fuzz"].iter().any(|name| in_folder(name))
            && !self.path.ends_with("/tests.rs")
            && !self.path.ends_with("_tests.rs")
    }

    /// The text before the unit tests at the end of the file.
    fn product_text(&self) -> &str {
        let end = self.text.find("\n#[cfg(test)]\nmod tests {").unwrap_or(self.text.len());
        &self.text[..end]
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn collect(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        // only build output is called so; a module may have any name
        let output = name == "target" && !relative(folder).contains("src");
        if output || name.starts_with('.') || name == "corpus" {
            continue;
        }
        if path.is_dir() {
            collect(&path, extension, found);
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().into_owned()
}

fn sources(extension: &str) -> Vec<Source> {
    let mut paths = Vec::new();
    collect(&root(), extension, &mut paths);
    paths.sort();
    paths
        .iter()
        .filter_map(|path| {
            fs::read_to_string(path).ok().map(|text| Source { path: relative(path), text })
        })
        .collect()
}

fn demand(findings: Vec<Finding>) {
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

/// The text with comments, strings and character literals blanked; lines stay where they are.
fn code_of(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = literal_end(&bytes, at);
        if end == at {
            out.push(bytes[at]);
            at += 1;
            continue;
        }
        for c in &bytes[at..end] {
            out.push(if *c == '\n' { '\n' } else { ' ' });
        }
        at = end;
    }
    out
}

/// Where the comment, string or character literal that starts at `at` ends; `at` if none does.
fn literal_end(text: &[char], at: usize) -> usize {
    let next = |n: usize| text.get(at + n).copied().unwrap_or('\0');
    let before = if at == 0 { ' ' } else { text[at - 1] };
    match text[at] {
        '/' if next(1) == '/' => {
            text[at..].iter().position(|c| *c == '\n').map_or(text.len(), |n| at + n)
        }
        '/' if next(1) == '*' => block_comment_end(text, at),
        'r' if (next(1) == '"' || next(1) == '#') && !is_word(before)
            || before == 'b' && next(1) == '"' =>
        {
            raw_string_end(text, at)
        }
        '"' => quoted_end(text, at, '"'),
        '\'' if next(1) == '\\' => quoted_end(text, at, '\''),
        '\'' if next(2) == '\'' => at + 3,
        _ => at,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn block_comment_end(text: &[char], at: usize) -> usize {
    let mut i = at + 2;
    while i + 1 < text.len() && !(text[i] == '*' && text[i + 1] == '/') {
        i += 1;
    }
    (i + 2).min(text.len())
}

fn raw_string_end(text: &[char], at: usize) -> usize {
    let hashes = text[at + 1..].iter().take_while(|c| **c == '#').count();
    let mut i = at + 1 + hashes;
    if text.get(i) != Some(&'"') {
        return at;
    }
    i += 1;
    while i < text.len() {
        let closing = text[i + 1..].iter().take(hashes).filter(|c| **c == '#').count();
        if text[i] == '"' && closing == hashes {
            return i + 1 + hashes;
        }
        i += 1;
    }
    text.len()
}

fn quoted_end(text: &[char], at: usize, quote: char) -> usize {
    let mut i = at + 1;
    while i < text.len() {
        match text[i] {
            '\\' => i += 2,
            c if c == quote => return i + 1,
            _ => i += 1,
        }
    }
    text.len()
}

/// (line number of `fn`, lines) of every function with a body.
fn functions(text: &str) -> Vec<(usize, usize)> {
    let code = code_of(text);
    let lines: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        if starts_function(line)
            && let Some(length) = body_length(&lines[start..])
        {
            found.push((start + 1, length));
        }
    }
    found
}

fn starts_function(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let modifiers = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern"];
    loop {
        match words.next() {
            Some("fn") => return true,
            Some(word) if modifiers.contains(&word) || word.starts_with("pub(in") => {}
            _ => return false,
        }
    }
}

/// The lines from the first to the one that closes the body; None for a declaration.
fn body_length(lines: &[&str]) -> Option<usize> {
    let (mut depth, mut brackets, mut opened) = (0usize, 0usize, false);
    for (count, line) in lines.iter().enumerate() {
        for c in line.chars() {
            match c {
                '(' | '[' => brackets += 1,
                ')' | ']' => brackets = brackets.saturating_sub(1),
                '{' => (depth, opened) = (depth + 1, true),
                '}' => depth = depth.saturating_sub(1),
                ';' if !opened && brackets == 0 => return None,
                _ => {}
            }
            if opened && depth == 0 {
                return Some(count + 1);
            }
        }
    }
    None
}

// -- the rules --------------------------------------------------------------------------------

fn sizes(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let count = source.text.lines().count();
    if source.is_product() && count > FILE_LINES_MAX {
        findings.push(format!("{}: {count} lines, the limit is {FILE_LINES_MAX}", source.path));
    }
    findings.extend(wide_lines(source));
    if source.is_product() {
        for (line, length) in functions(source.product_text()) {
            if length > FUNCTION_LINES_MAX {
                findings.push(format!("{}:{line}: a function of {length} lines", source.path));
            }
        }
    }
    findings
}

fn header(source: &Source) -> Vec<Finding> {
    if source.text.starts_with("//!") {
        return Vec::new();
    }
    vec![format!("{}: the first line is no `//!` header", source.path)]
}

/// A test's name is a sentence, the attribute says already that it is a test.
fn sentence_names(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (n, line) in code_of(&source.text).lines().enumerate() {
        if starts_function(line) && line.contains("fn test_") {
            findings.push(format!("{}:{}: a name with test_", source.path, n + 1));
        }
    }
    findings
}

fn wide_lines(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (n, line) in source.text.lines().enumerate() {
        let columns = line.chars().count();
        if columns > LINE_COLUMNS_MAX {
            findings.push(format!("{}:{}: {columns} columns", source.path, n + 1));
        }
    }
    findings
}

fn unfinished_marks() -> Vec<String> {
    // spelled in halves, so that this file does not find itself
    [
        ("TO", "DO"),
        ("FIX", "ME"),
        ("XX", "X"),
        ("HA", "CK"),
        ("todo", "!("),
        ("unimplemented", "!("),
    ]
    .iter()
    .map(|(a, b)| format!("{a}{b}"))
    .chain([format!("#[{}", "ignore")])
    .collect()
}

fn unfinished(source: &Source) -> Vec<Finding> {
    let marks = unfinished_marks();
    let mut findings = Vec::new();
    for (n, line) in source.text.lines().enumerate() {
        for mark in marks.iter().filter(|mark| has_word(line, mark)) {
            findings.push(format!("{}:{}: unfinished mark {mark}", source.path, n + 1));
        }
    }
    findings
}

/// Whether `word` stands in `line` and is not part of a longer word.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back().unwrap_or(' ');
        let after = line[at + word.len()..].chars().next().unwrap_or(' ');
        let open_end = word.ends_with(|c: char| !is_word(c));
        !is_word(before) && (open_end || !is_word(after))
    })
}

/// Outside the driver nothing may depend on the clock, the thread or a random seed.
fn determinism(source: &Source) -> Vec<Finding> {
    let inside = ["engine/src/", "formats/src/", "jobs/src/"];
    if !inside.iter().any(|folder| source.path.starts_with(folder))
        || source.path.starts_with("engine/src/driver")
    {
        return Vec::new();
    }
    let banned = [
        "Instant::now",
        "SystemTime::now",
        "thread_local!",
        "HashMap::new(",
        "HashSet::new(",
        "HashMap::with_capacity(",
        "HashSet::with_capacity(",
        "RandomState",
        "thread::sleep",
    ];
    let code = code_of(source.product_text());
    let mut findings = Vec::new();
    for (n, line) in code.lines().enumerate() {
        for word in banned.iter().filter(|word| line.contains(**word)) {
            findings.push(format!("{}:{}: {word} outside the driver", source.path, n + 1));
        }
    }
    findings
}

/// `lib.rs` and `mod.rs` hold header, module list and re-exports.
fn no_logic_in_roots(source: &Source) -> Vec<Finding> {
    let name = source.path.rsplit('/').next().unwrap_or_default();
    if !source.is_product() || !["lib.rs", "mod.rs"].contains(&name) {
        return Vec::new();
    }
    functions(&source.text)
        .iter()
        .map(|(line, _)| format!("{}:{line}: a function body in {name}", source.path))
        .collect()
}

/// Nothing that a real machine's layout would put in: it must build anywhere.
fn machine_paths(source: &Source) -> Vec<Finding> {
    let places = [("/wo", "rk/"), ("/ho", "me/"), ("/ro", "ot/"), ("/tmp/", "t-")];
    let mut findings = Vec::new();
    for (n, line) in source.text.lines().enumerate() {
        for place in places.iter().map(|(a, b)| format!("{a}{b}")) {
            if line.contains(&place) {
                findings.push(format!("{}:{}: a path of one machine, {place}", source.path, n + 1));
            }
        }
    }
    findings
}

fn folder_names(paths: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for path in paths {
        for part in path.split('/') {
            let stem = part.trim_end_matches(".rs").trim_end_matches(".py");
            if FOLDERS_WITHOUT_NOUN.contains(&stem) {
                findings.push(format!("{path}: `{part}` says nothing about what is inside"));
            }
        }
    }
    findings
}

/// The `liveblk*` dependencies of a manifest, without its dev-dependencies.
fn product_dependencies(manifest: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut section = String::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
        }
        let counts = section == "dependencies"
            || section == "build-dependencies"
            || section.starts_with("target.") && !section.ends_with("dev-dependencies");
        let name: String = line.chars().take_while(|c| is_word(*c) || *c == '-').collect();
        if counts && name.starts_with("liveblk") {
            found.push(name);
        }
    }
    found
}

/// control -> {exports, jobs, formats} -> engine, and nothing depends on control.
fn arrows(manifests: &BTreeMap<String, String>) -> Vec<Finding> {
    let all = ["engine", "formats", "jobs", "exports"];
    let mut findings = Vec::new();
    for (folder, text) in manifests {
        let allowed: &[&str] = match folder.as_str() {
            "engine" => &[],
            "formats" | "jobs" | "exports" => &["engine"],
            "fuzz" => &["engine", "formats", "jobs", "exports", "control"],
            _ => &all,
        };
        for dependency in product_dependencies(text) {
            let name = dependency.strip_prefix("liveblk-").unwrap_or("facade");
            let facade =
                name == "facade" && ["control", "bench", "fuzz"].contains(&folder.as_str());
            if !allowed.contains(&name) && !facade {
                findings.push(format!("{folder}/Cargo.toml depends on {dependency}"));
            }
        }
    }
    findings
}

fn manifests() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for source in sources("toml") {
        if let Some(folder) = source.path.strip_suffix("Cargo.toml") {
            let folder = folder.trim_end_matches('/');
            let name = if folder.is_empty() { "liveblk" } else { folder };
            found.insert(name.to_owned(), source.text);
        }
    }
    found
}

fn licences(manifests: &BTreeMap<String, String>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (folder, text) in manifests {
        if !text.contains(&format!("license = \"{LICENSE}\""))
            && !text.contains("license.workspace = true")
        {
            findings.push(format!("{folder}/Cargo.toml names no licence ({LICENSE})"));
        }
    }
    findings
}

fn every_source(rule: fn(&Source) -> Vec<Finding>) {
    demand(sources("rs").iter().flat_map(rule).collect());
}

// -- the tree ---------------------------------------------------------------------------------

#[test]
fn files_functions_and_lines_keep_their_limits() {
    every_source(sizes);
    demand(sources("py").iter().flat_map(wide_lines).collect());
}

#[test]
fn names_of_tests_are_sentences() {
    every_source(sentence_names);
}

#[test]
fn every_file_opens_with_a_header() {
    every_source(header);
}

#[test]
fn nothing_is_left_unfinished() {
    every_source(unfinished);
}

#[test]
fn engine_formats_and_jobs_are_deterministic_outside_the_driver() {
    every_source(determinism);
}

/// Files of a folder with a `main.rs` that it does not name: their tests would never run.
fn forgotten_tests(main: &Source, files: &[&str]) -> Vec<Finding> {
    let folder = main.path.trim_end_matches("main.rs");
    files
        .iter()
        .filter_map(|path| path.strip_prefix(folder)?.strip_suffix(".rs"))
        .filter(|name| !name.contains('/') && *name != "main")
        .filter(|name| !main.text.lines().any(|line| line == format!("mod {name};")))
        .map(|name| format!("{}: {name}.rs is not one of its modules", main.path))
        .collect()
}

#[test]
fn no_file_of_tests_is_left_out_of_its_program() {
    let all = sources("rs");
    let paths: Vec<&str> = all.iter().map(|source| source.path.as_str()).collect();
    let mains = all.iter().filter(|source| source.path.ends_with("/main.rs"));
    let mains: Vec<_> = mains.filter(|source| source.path.contains("tests/")).collect();
    assert!(mains.len() >= 3, "the programs of tests are elsewhere: {}", mains.len());
    demand(mains.iter().flat_map(|main| forgotten_tests(main, &paths)).collect());
}

#[test]
fn crate_and_module_roots_hold_no_logic() {
    every_source(no_logic_in_roots);
}

#[test]
fn no_path_of_one_machine_is_in_the_tree() {
    let mut findings = Vec::new();
    for extension in ["rs", "py", "toml", "md", "sh"] {
        findings.extend(sources(extension).iter().flat_map(machine_paths));
    }
    demand(findings);
}

#[test]
fn folders_have_a_noun_as_their_name() {
    let paths: Vec<String> =
        sources("rs").into_iter().chain(sources("py")).map(|source| source.path).collect();
    demand(folder_names(&paths));
}

#[test]
fn import_arrows_point_down() {
    let manifests = manifests();
    for name in CRATES {
        assert!(manifests.contains_key(name), "{name}/Cargo.toml is missing");
    }
    demand(arrows(&manifests));
}

#[test]
fn unsafe_code_is_forbidden_where_nothing_needs_it() {
    let mut findings = Vec::new();
    for name in ["formats", "jobs", "control"] {
        let path = root().join(name).join("src/lib.rs");
        let text = fs::read_to_string(&path).unwrap_or_default();
        if !text.contains("#![forbid(unsafe_code)]") {
            findings.push(format!("{}: no #![forbid(unsafe_code)]", relative(&path)));
        }
    }
    demand(findings);
}

#[test]
fn both_licences_are_there_and_named() {
    let mut findings = licences(&manifests());
    for (file, words) in
        [("LICENSE-MIT", "Permission is hereby granted"), ("LICENSE-APACHE", "Apache License")]
    {
        if !fs::read_to_string(root().join(file)).unwrap_or_default().contains(words) {
            findings.push(format!("{file} is missing or is another text"));
        }
    }
    demand(findings);
}

/// Rows of the fault catalogue that need a test, by letter.
const ROWS: [(char, std::ops::RangeInclusive<u32>); 3] =
    [('P', 1..=10), ('Q', 1..=22), ('R', 1..=21)];

/// The rows of the table in `text` (`| Q7 | … | `file::test`, … |`) without a test, and the tests
/// that `file_of` does not have.
fn rows(text: &str, file_of: impl Fn(&str) -> Option<String>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (letter, numbers) in ROWS {
        for row in numbers.map(|number| format!("{letter}{number}")) {
            let start = format!("| {row} |");
            let named = text.lines().any(|line| line.starts_with(&start) && line.contains("::"));
            if !named {
                findings.push(format!("{row}: no test"));
            }
        }
    }
    let lines = text.lines().filter(|line| line.starts_with('|'));
    for name in lines.flat_map(|line| line.split('`').skip(1).step_by(2)) {
        let found = name
            .split_once("::")
            .is_some_and(|(file, test)| file_of(file).is_some_and(|text| has_test(&text, test)));
        if !found {
            findings.push(format!("{name}: no such test"));
        }
    }
    findings
}

/// Whether `text`, Rust or Python, has the test `name`.
fn has_test(text: &str, name: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    lines.windows(2).any(|pair| {
        let marked = pair[0] == "#[test]" && pair[1].starts_with(&format!("fn {name}("));
        let case = pair[0].starts_with("@case(");
        marked || (case && pair[1].starts_with(&format!("async def {name}(")))
    })
}

#[test]
fn each_row_of_the_fault_catalogue_has_a_test_that_exists() {
    let text = fs::read_to_string(root().join("tests/ROWS.md")).unwrap_or_default();
    demand(rows(&text, |file| fs::read_to_string(root().join(file)).ok()));
}

// -- the rules must be able to say no ---------------------------------------------------------

fn planted(path: &str, text: &str) -> Source {
    Source { path: path.to_owned(), text: text.to_owned() }
}

#[test]
fn planted_sizes_are_found() {
    let long_function = format!("//! h\nfn f() {{\n{}}}\n", "    g();\n".repeat(70));
    assert_eq!(sizes(&planted("engine/src/x.rs", &long_function)).len(), 1);
    assert!(sizes(&planted("engine/tests/x.rs", &long_function)).is_empty());
    let fits = format!("//! h\nfn f() {{\n{}}}\n", "    g();\n".repeat(68));
    assert!(sizes(&planted("engine/src/x.rs", &fits)).is_empty());
    let long_file = "//! h\n".repeat(FILE_LINES_MAX + 1);
    assert_eq!(sizes(&planted("jobs/src/x.rs", &long_file)).len(), 1);
    let wide = format!("//! {}\n", "x".repeat(LINE_COLUMNS_MAX));
    assert_eq!(sizes(&planted("tests/x.rs", &wide)).len(), 1);
}

#[test]
fn braces_in_text_do_not_confuse_the_counting() {
    let text = "fn a(x: [u8; 4]) -> char {\n    let s = \"{{{ \\\" \";\n    let r = r#\"}\"#;\n    \
                // }\n    /* { */\n    '{'\n}\nfn b<'a>(x: &'a str);\npub(crate) async fn c() {}\n";
    assert_eq!(functions(text), vec![(1, 7), (9, 1)]);
}

#[test]
fn planted_text_is_found() {
    let file = |text: &str| planted("jobs/src/x.rs", text);
    assert_eq!(header(&file("use std::fs;\n")).len(), 1);
    for mark in unfinished_marks() {
        assert_eq!(unfinished(&file(&format!("//! h\n// {mark} later\n"))).len(), 1, "{mark}");
    }
    assert!(unfinished(&file("//! h\nlet hackney = 1; // mastodon\n")).is_empty());
    for text in [
        "let t = Instant::now();",
        "let m: HashMap<u8, u8> = HashMap::new();",
        "thread_local!(static X: u8 = 1);",
        "let t = std::time::SystemTime::now();",
    ] {
        assert_eq!(determinism(&file(text)).len(), 1, "{text}");
        assert!(determinism(&planted("engine/src/driver/ring.rs", text)).is_empty());
        assert!(determinism(&planted("control/src/x.rs", text)).is_empty());
    }
    assert!(determinism(&file("// Instant::now is not for us\n")).is_empty());
    assert_eq!(sentence_names(&file("fn test_it() {}\n")).len(), 1);
    assert!(sentence_names(&file("fn tested() {}\n")).is_empty());
    let root_file = |text: &str| planted("formats/src/qcow2/mod.rs", text);
    assert_eq!(no_logic_in_roots(&root_file("//! h\npub fn f() {}\n")).len(), 1);
    assert!(no_logic_in_roots(&root_file("//! h\nmod a;\npub use a::f;\n")).is_empty());
    assert_eq!(machine_paths(&file(&format!("//! {}{}x\n", "/ho", "me/"))).len(), 1);
    assert_eq!(folder_names(&["engine/src/util/x.rs".to_owned()]).len(), 1);
    assert_eq!(folder_names(&["engine/src/helpers.rs".to_owned()]).len(), 1);
    assert!(folder_names(&["engine/src/baseline.rs".to_owned()]).is_empty());
}

#[test]
fn planted_files_of_tests_are_found() {
    let main = planted("tests/all/main.rs", "//! h\nmod one;\n");
    let files = ["tests/all/main.rs", "tests/all/one.rs", "tests/all/two.rs", "tests/other.rs"];
    assert_eq!(forgotten_tests(&main, &files).len(), 1);
}

#[test]
fn planted_arrows_are_found() {
    let manifest =
        |folder: &str, text: &str| BTreeMap::from([(folder.to_owned(), text.to_owned())]);
    let wrong = [
        ("engine", "[dependencies]\nliveblk-jobs.workspace = true\n"),
        ("formats", "[dependencies]\nliveblk-jobs = { path = \"../jobs\" }\n"),
        ("jobs", "[build-dependencies]\nliveblk-formats.workspace = true\n"),
        ("exports", "[dependencies]\nliveblk-control.workspace = true\n"),
        ("liveblk", "[dependencies]\nliveblk-control.workspace = true\n"),
    ];
    for (folder, text) in wrong {
        assert_eq!(arrows(&manifest(folder, text)).len(), 1, "{folder}: {text}");
        let dev = text.replace("[dependencies]", "[dev-dependencies]");
        if dev != text {
            assert!(arrows(&manifest(folder, &dev)).is_empty(), "{folder}: {dev}");
        }
    }
    let fine = "[dependencies]\nliveblk-engine.workspace = true\n";
    assert!(arrows(&manifest("jobs", fine)).is_empty());
    assert_eq!(licences(&manifest("jobs", "[package]\nname = \"x\"\n")).len(), 1);
}

#[test]
fn planted_rows_are_found() {
    let file = |name: &str| (name == "a.rs").then(|| "#[test]\nfn works() {\n".to_owned());
    let all: String = ROWS
        .into_iter()
        .flat_map(|(letter, numbers)| {
            numbers.map(move |at| format!("| {letter}{at} | x | `a.rs::works` |\n"))
        })
        .collect();
    assert!(rows(&all, file).is_empty());
    assert_eq!(rows(&all.replace("| Q9 |", "| Q99 |"), file), ["Q9: no test"]);
    assert_eq!(rows(&format!("{all}| X | x | `a.rs::fails` |\n"), file).len(), 1);
    assert_eq!(rows(&format!("{all}| X | x | `b.rs::works` |\n"), file).len(), 1);
}
