//! What happens on a terminal: passwords are asked for and never shown, deletions are confirmed. The terminal is the one
//! that script(1), an essential package, makes.

use std::{
    io::{Read, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::common::Sandbox;

const LIMIT: Duration = Duration::from_secs(60);

/// A command on a terminal of its own.
struct Terminal {
    child: Child,
    keyboard: Option<ChildStdin>,
    screen: Arc<Mutex<String>>,
}

impl Terminal {
    fn run(sandbox: &Sandbox, args: &[&str]) -> Self {
        let inner = sandbox.command(args);
        let line = format!("{} {}", inner.get_program().display(), args.join(" "));
        let mut command = Command::new("script");
        command.args(["-q", "-e", "-f", "-c", &line, "/dev/null"]).env("TERM", "xterm").env("SHELL", "/bin/sh");
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.current_dir(inner.get_current_dir().unwrap());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("script(1) starts");
        let screen = Arc::new(Mutex::new(String::new()));
        let (shown, mut output) = (screen.clone(), child.stdout.take().unwrap());
        thread::spawn(move || {
            let mut data = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut data) {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&data[..count]));
            }
        });
        Self { keyboard: child.stdin.take(), child, screen }
    }

    fn screen(&self) -> String {
        self.screen.lock().unwrap().clone()
    }

    #[track_caller]
    fn expect(&self, text: &str) -> &Self {
        let deadline = Instant::now() + LIMIT;
        while !self.screen().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} did not appear:\n{}", self.screen());
            thread::sleep(Duration::from_millis(10));
        }
        self
    }

    fn type_keys(&mut self, keys: &str) {
        // The prompt is shown just before the terminal is told not to echo; nobody types that fast.
        thread::sleep(Duration::from_millis(200));
        self.keyboard.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// The exit status and all that was shown.
    #[track_caller]
    fn end(mut self) -> (i32, String) {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.screen());
            thread::sleep(Duration::from_millis(10));
        };
        thread::sleep(Duration::from_millis(100));
        (status.code().unwrap_or(-1), self.screen())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_password_is_asked_for_twice_at_init_and_never_shown() {
    let sandbox = Sandbox::new();
    let mut terminal = Terminal::run(&sandbox, &["repo", "init"]);
    terminal.expect("(empty: a key file");
    terminal.type_keys("hunter2\n");
    terminal.expect("The same again");
    terminal.type_keys("hunter2\n");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{screen}");
    assert!(!screen.contains("hunter2"), "{screen}");
    assert!(!sandbox.path("etc/repo.key").exists());

    let mut terminal = Terminal::run(&sandbox, &["repo", "info"]);
    terminal.expect("Password of");
    terminal.type_keys("hunter2\n");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{screen}");
    assert!(screen.contains("restore points"), "{screen}");

    let mut terminal = Terminal::run(&sandbox, &["repo", "info"]);
    terminal.expect("Password of");
    terminal.type_keys("hunter3\n");
    assert_eq!(terminal.end().0, 8);

    let mut terminal = Terminal::run(&sandbox, &["repo", "info"]);
    terminal.expect("Password of");
    terminal.type_keys("hun\x03");
    assert_eq!(terminal.end().0, 130);
}

#[test]
fn two_different_passwords_change_nothing_and_an_empty_one_means_a_key_file() {
    let sandbox = Sandbox::new();
    let mut terminal = Terminal::run(&sandbox, &["repo", "init"]);
    terminal.expect("(empty: a key file");
    terminal.type_keys("one\n");
    terminal.expect("The same again");
    terminal.type_keys("two\n");
    assert_eq!(terminal.end().0, 2);
    assert!(!sandbox.path("repo").exists());

    let mut terminal = Terminal::run(&sandbox, &["repo", "init"]);
    terminal.expect("(empty: a key file");
    terminal.type_keys("\n");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{screen}");
    assert!(sandbox.path("etc/repo.key").exists());
    sandbox.run(&["repo", "info"]).ok();
}

#[test]
fn a_deletion_is_confirmed_or_does_not_happen() {
    let sandbox = Sandbox::with_repository();
    crate::common::fill(&sandbox.path("disk.raw"), 0, 1 << 20, 1);
    sandbox.run(&["backup", "image", "disk.raw"]).ok();
    for (answer, code, left) in [("n\n", 4, 1), ("\n", 4, 1), ("y\n", 0, 0)] {
        let mut terminal = Terminal::run(&sandbox, &["backup", "delete", "disk@latest"]);
        terminal.expect("[y/N]");
        terminal.type_keys(answer);
        let (ended, screen) = terminal.end();
        assert_eq!(ended, code, "{answer:?}: {screen}");
        assert_eq!(sandbox.json(&["backup", "list"]).as_array().unwrap().len(), left, "{answer:?}");
    }
}

#[test]
fn progress_is_a_bar_on_a_terminal() {
    let sandbox = Sandbox::with_repository();
    crate::common::fill(&sandbox.path("disk.raw"), 0, 4 << 20, 1);
    let terminal = Terminal::run(&sandbox, &["backup", "image", "disk.raw", "--bandwidth", "2MiB"]);
    terminal.expect("copying").expect("left");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{screen}");
}
