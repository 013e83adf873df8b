//! Looks at the HTML report as a reader sees it: headless Chromium draws it, at the width of a desk and of a phone, light and
//! dark, and every mark of every plot must be there in its colour.
//!
//! The record under `data/` is of a real run. CKPT_REQUIRE=chromium has these tests fail where there is no Chromium;
//! otherwise they say that they were skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

const DESK: u32 = 1280;
const PHONE: u32 = 390;

/// Runs in the report, and tells the page around it what is where.
const MEASURING: &str = "<script>addEventListener('load', () => {
  const box = (element) => { const r = element.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
  const plots = [...document.querySelectorAll('figure.plot')].map((plot) => ({
    title: plot.querySelector('figcaption').textContent,
    rectangle: box(plot),
    texts: [...plot.querySelectorAll('text')].map(box),
    marks: [...plot.querySelectorAll('.mark')].map((mark) => {
      const style = getComputedStyle(mark);
      return { rectangle: box(mark), colour: mark.tagName == 'rect' ? style.fill : style.stroke };
    }),
  }));
  const root = document.documentElement;
  parent.postMessage(JSON.stringify({
    plots, height: root.scrollHeight, content_width: root.scrollWidth, width: innerWidth,
    ground: getComputedStyle(document.body).backgroundColor,
  }), '*');
})</script>";

#[derive(Deserialize)]
struct Page {
    plots: Vec<Plot>,
    height: f64,
    width: f64,
    content_width: f64,
    ground: String,
}

#[derive(Deserialize)]
struct Plot {
    title: String,
    rectangle: [f64; 4],
    texts: Vec<[f64; 4]>,
    marks: Vec<Mark>,
}

#[derive(Deserialize)]
struct Mark {
    rectangle: [f64; 4],
    colour: String,
}

struct Screen {
    page: Page,
    pixels: Vec<u8>,
    width: usize,
    height: usize,
}

fn chromium() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-headless-shell", "google-chrome"];
    std::env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name))).find(|file| file.is_file())
}

/// Chromium, or why these tests cannot be run.
fn chromium_or_skip() -> Option<PathBuf> {
    let found = chromium();
    if found.is_none() {
        let required = std::env::var("CKPT_REQUIRE").unwrap_or_default();
        assert!(
            !required.split(',').any(|what| what == "chromium"),
            "CKPT_REQUIRE has chromium, and there is none on PATH"
        );
        println!("skipped: there is no chromium on PATH; ./ci deps installs it");
    }
    found
}

fn draw(chromium: &Path, folder: &Path, report: &str, width: u32, dark: bool) -> Screen {
    let report_file = folder.join("report.html");
    std::fs::write(&report_file, report.replace("</body>", &format!("{MEASURING}</body>"))).unwrap();
    let around = |height: u32| {
        // Chromium has no window as narrow as a phone, but frames.
        format!(
            "<!doctype html><meta name=\"color-scheme\" content=\"light dark\"><style>body{{margin:0}}</style>\
             <pre id=\"told\" hidden></pre>\
             <script>addEventListener('message', (event) => {{ told.textContent = event.data; }})</script>\
             <iframe src=\"report.html\" style=\"width:{width}px;height:{height}px;border:0;display:block\"></iframe>"
        )
    };
    let file = folder.join("around.html");
    let run = |height: u32, more: &[&str]| {
        std::fs::write(&file, around(height)).unwrap();
        let mut command = Command::new(chromium);
        command.args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=10000",
        ]);
        command.arg(format!("--user-data-dir={}", folder.join("profile").display()));
        command.arg(format!("--window-size={},{height}", width.max(600)));
        command.arg(format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 }));
        let output = command.args(more).arg(&file).stderr(Stdio::null()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let told = |dom: &str| -> Page {
        let start = dom.find("hidden=\"\">").map(|at| at + 10).expect("the page tells what is where");
        let end = start + dom[start..].find("</pre>").unwrap();
        let text = dom[start..end].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:.200}"))
    };
    let height = told(&run(1000, &["--dump-dom"])).height as u32;
    let page = told(&run(height, &["--dump-dom"]));
    let shot = folder.join("shot.png");
    run(height, &[&format!("--screenshot={}", shot.display())]);
    let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&shot).expect("a screenshot")));
    let mut reader = decoder.read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    let channels = info.color_type.samples();
    let pixels =
        bytes[..info.buffer_size()].chunks_exact(channels).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
    if let Some(keep) = std::env::var_os("CKPT_KEEP_SCREENSHOTS") {
        let name = format!("{width}-{}.png", if dark { "dark" } else { "light" });
        std::fs::copy(&shot, Path::new(&keep).join(name)).unwrap();
    }
    Screen { page, pixels, width: info.width as usize, height: info.height as usize }
}

/// `rgb(1, 2, 3)`
fn colour(text: &str) -> [u8; 3] {
    let numbers = text.trim_start_matches(|c: char| !c.is_ascii_digit()).trim_end_matches(')');
    let numbers: Vec<u8> = numbers.split(',').take(3).map(|number| number.trim().parse().unwrap()).collect();
    [numbers[0], numbers[1], numbers[2]]
}

impl Screen {
    /// How many pixels of a rectangle have (nearly) this colour.
    fn count(&self, [x, y, width, height]: [f64; 4], wanted: [u8; 3]) -> usize {
        let columns = (x - 1.0).max(0.0) as usize..((x + width + 1.0) as usize).min(self.width);
        let rows = (y - 1.0).max(0.0) as usize..((y + height + 1.0) as usize).min(self.height);
        rows.flat_map(|row| columns.clone().map(move |column| (row * self.width + column) * 3))
            .filter(|&at| self.pixels[at..at + 3].iter().zip(wanted).all(|(got, wanted)| got.abs_diff(wanted) <= 24))
            .count()
    }

    /// What is wrong with what was drawn; nothing, where all is well.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.page.plots.is_empty() {
            faults.push("there is no plot".into());
        }
        if self.page.content_width > self.page.width {
            faults.push(format!("it is {} wide on a screen of {}", self.page.content_width, self.page.width));
        }
        let ground = colour(&self.page.ground);
        for plot in &self.page.plots {
            if plot.marks.is_empty() {
                faults.push(format!("{}: no mark", plot.title));
            }
            let [left, top, width, height] = plot.rectangle;
            let inside = |[x, y, w, h]: [f64; 4]| {
                x >= left - 1.0 && y >= top - 1.0 && x + w <= left + width + 1.0 && y + h <= top + height + 1.0
            };
            for text in plot.texts.iter().filter(|text| !inside(**text)) {
                faults.push(format!("{}: a text at {text:?} sticks out of {:?}", plot.title, plot.rectangle));
            }
            for mark in &plot.marks {
                let wanted = colour(&mark.colour);
                // A line has fewer pixels of its own colour than a bar, as its edges are smoothed.
                let found = self.count(mark.rectangle, wanted);
                if found < 4 {
                    faults.push(format!("{}: a mark at {:?} shows {found} pixels", plot.title, mark.rectangle));
                }
                if wanted.iter().zip(ground).map(|(a, b)| u32::from(a.abs_diff(b))).sum::<u32>() < 120 {
                    faults.push(format!("{}: a mark of {} on {}", plot.title, mark.colour, self.page.ground));
                }
            }
        }
        faults
    }
}

fn report(folder: &Path) -> String {
    let html = folder.join("made.html");
    let json = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bench.json");
    let output = Command::new(env!("CARGO_BIN_EXE_ckpt-bench")).arg("report").arg(json).arg(&html).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read_to_string(html).unwrap()
}

#[test]
fn the_report_needs_no_other_file() {
    let folder = tempfile::tempdir().unwrap();
    let report = report(folder.path());
    for outside in ["src=", "href=", "@import", "url(", "http://", "https://", "<script"] {
        assert!(!report.contains(outside), "{outside}");
    }
}

#[test]
fn every_plot_is_drawn_wide_and_narrow_light_and_dark() {
    let Some(chromium) = chromium_or_skip() else { return };
    let folder = tempfile::tempdir().unwrap();
    let report = report(folder.path());
    let plots = report.matches("<figure class=\"plot\">").count();
    for title in ["Freeze", "Time against size", "Latency distribution", "Run-time overhead"] {
        assert!(report.contains(&format!("<h2>{title}</h2>")), "no plots of {title}");
    }
    for (width, dark) in [(DESK, false), (DESK, true), (PHONE, false), (PHONE, true)] {
        let screen = draw(&chromium, folder.path(), &report, width, dark);
        assert_eq!(screen.page.plots.len(), plots);
        assert_eq!(screen.page.width as u32, width);
        let brightness: u32 = colour(&screen.page.ground).iter().map(|&part| u32::from(part)).sum();
        assert_eq!(brightness < 380, dark, "{}", screen.page.ground);
        assert_eq!(screen.faults(), [""; 0], "at {width}, dark: {dark}");
    }
}

/// The look at the pixels must find what it is for.
#[test]
fn a_plot_that_is_not_drawn_is_found() {
    let Some(chromium) = chromium_or_skip() else { return };
    let folder = tempfile::tempdir().unwrap();
    let report = report(folder.path());
    let broken = [
        ("hidden", report.replace("</style>", ".plot:nth-child(2) .mark { visibility: hidden; }</style>")),
        ("covered", report.replace("</style>", ".plot svg { opacity: 0; }</style>")),
        ("too wide", report.replace("</style>", ".plots { width: 2000px; }</style>")),
        (
            "no contrast",
            report.replace("</style>", ".mark { fill: #fbfbfa !important; stroke: #fbfbfa !important; }</style>"),
        ),
        ("empty", report.replace("class=\"mark ", "class=\"")),
    ];
    for (what, report) in broken {
        let screen = draw(&chromium, folder.path(), &report, DESK, false);
        assert!(!screen.faults().is_empty(), "{what} was not found");
    }
}
