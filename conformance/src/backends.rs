//! The backends under test: a crate that nobody names registers nothing. One line joins.

use ckpt_preload as _;
use ckpt_ptrace as _;
use ckpt_userfault as _;
