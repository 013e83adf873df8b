use ckpt_core::backend::*;
use ckpt_core::batch::*;
use ckpt_core::*;
fn main() {
    let pid: i32 = std::env::args().nth(1).unwrap().parse().unwrap();
    let t = std::time::Instant::now();
    let mut f = ckpt_ptrace::PtraceDumper
        .freeze(
            Pid(pid),
            &DumpOptions { shell_job: false, tcp_close: false, timeout: std::time::Duration::from_secs(10) },
        )
        .unwrap();
    println!("frozen {:?}", t.elapsed());
    for target in f.targets() {
        let t = std::time::Instant::now();
        let mut b = Batch::new();
        let p = b.call(Sysno::getpid, args![]);
        let tm = b.room(16);
        b.call(Sysno::clock_gettime, args![0, tm]);
        let r = target.run(&b).unwrap();
        println!("getpid {} time {} in {:?}", r.value(p), r.u64(tm), t.elapsed());
        for i in 0..target.threads().len().min(3) {
            let t = std::time::Instant::now();
            let r = target.run_on(i, &b).unwrap();
            println!("on {i}: {} {:?}", r.value(p), t.elapsed());
        }
        println!("{:?}", target.pending(Queue::Shared).unwrap().len());
        println!("{:?}", target.footprint());
        println!(
            "{}",
            std::fs::read_to_string(format!("/proc/{pid}/maps"))
                .unwrap()
                .lines()
                .filter(|l| l.contains("memfd"))
                .collect::<Vec<_>>()
                .join("\n")
        );
    }
    if std::env::args().nth(2).as_deref() == Some("die") {
        nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL).unwrap();
    }
    let t = std::time::Instant::now();
    f.thaw().unwrap();
    println!("thawed {:?}", t.elapsed());
}
