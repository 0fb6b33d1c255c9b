//! Locates the programs that tests run as processes.

use std::path::PathBuf;

/// Path of the `quell` program.
///
/// This package has a binary target with the source of the product's `main`. Cargo builds the
/// binaries of a package before it runs the integration tests of the same package, so the
/// program is always of the same sources as the test.
pub fn path() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let mut folder = test.parent().unwrap().to_owned();
    // Cargo puts the program next to the folder of the tests; `scripts/gpu/pack` puts it next
    // to the test.
    if folder.ends_with("deps") {
        folder.pop();
    }
    let path = folder.join("quell-under-test");
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// Path of an example.
///
/// `cargo test` builds the examples, because they are targets of the tested crate. A run that
/// selects tests only, for example with `--test program`, does not.
///
/// # Panics
/// If the example is older than one of its sources.
pub fn example(name: &str) -> PathBuf {
    let folder = path().with_file_name("examples");
    let path = folder.join(name);
    let advice = "build it with `cargo test --no-run`";
    let time = |path: &PathBuf| std::fs::metadata(path).and_then(|data| data.modified());
    let Ok(built) = time(&path) else {
        panic!("{} is missing: {advice}", path.display());
    };
    // Cargo lists the sources as a rule of `make`: the example, a colon, and the paths.
    let rule = std::fs::read_to_string(path.with_extension("d")).unwrap();
    let sources = rule.lines().next().and_then(|rule| rule.split_once(": "));
    for source in sources.unwrap().1.split(' ').map(PathBuf::from) {
        let fresh = time(&source).is_ok_and(|changed| changed <= built);
        assert!(
            fresh,
            "{} is older than {}: {advice}",
            path.display(),
            source.display()
        );
    }
    path
}
