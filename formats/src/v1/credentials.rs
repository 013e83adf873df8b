//! Credentials of a thread.

use crate::wire::wire_struct;

wire_struct! {
    pub struct CredentialsV1 for ckpt_core::resource::credentials::Credentials {}
}
