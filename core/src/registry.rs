//! The backends that are linked in, sorted by name.

use crate::backend::Backend;

/// All registered backends. The order in which `inventory` has them is unspecified.
///
/// # Panics
/// If two have one name: a mistake in the program that links them.
pub fn backends() -> Vec<&'static Backend> {
    let mut backends: Vec<&Backend> = inventory::iter::<Backend>.into_iter().collect();
    backends.sort_by_key(|backend| backend.name);
    for pair in backends.windows(2) {
        assert_ne!(pair[0].name, pair[1].name, "two backends have one name");
    }
    backends
}

/// The backend with this name; else the names there are.
pub fn backend(name: &str) -> Result<&'static Backend, Vec<&'static str>> {
    let backends = backends();
    let names = backends.iter().map(|backend| backend.name).collect();
    backends.into_iter().find(|backend| backend.name == name).ok_or(names)
}
