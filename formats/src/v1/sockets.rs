//! What the kinds of sockets have in common.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use ckpt_core::resource::sockets::SocketOption;
use serde::{Deserialize, Serialize};

use crate::wire::{Bounds, Bytes, Entropy, Invalid, Item, Wire};

/// `[level, option, value]`, as `getsockopt` gives it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SocketOptionV1(pub i32, pub i32, pub Bytes);

impl Wire<SocketOption> for SocketOptionV1 {
    fn from_live(live: &SocketOption) -> SocketOptionV1 {
        SocketOptionV1(live.level, live.option, Bytes(live.value.clone()))
    }
    fn into_live(self, _bounds: &Bounds) -> Result<SocketOption, Invalid> {
        Ok(SocketOption { level: self.0, option: self.1, value: self.2.0 })
    }
    fn any(entropy: &mut Entropy<'_>) -> SocketOption {
        let (level, option) = (i32::any(entropy), i32::any(entropy));
        SocketOption { level, option, value: <Bytes as Wire<Vec<u8>>>::any(entropy) }
    }
}

impl Item for SocketOptionV1 {}

/// The 4 or 16 bytes of an IP address, in network order.
impl Wire<IpAddr> for Bytes {
    fn from_live(live: &IpAddr) -> Bytes {
        Bytes(match live {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        })
    }
    fn into_live(self, _bounds: &Bounds) -> Result<IpAddr, Invalid> {
        if let Ok(bytes) = <[u8; 4]>::try_from(self.0.as_slice()) {
            return Ok(Ipv4Addr::from(bytes).into());
        }
        match <[u8; 16]>::try_from(self.0.as_slice()) {
            Ok(bytes) => Ok(Ipv6Addr::from(bytes).into()),
            Err(_) => Err(Invalid::new(format!("an IP address of {} bytes", self.0.len()))),
        }
    }
    fn any(entropy: &mut Entropy<'_>) -> IpAddr {
        match entropy.byte() & 1 {
            0 => Ipv4Addr::from(std::array::from_fn::<u8, 4, _>(|_| entropy.byte())).into(),
            _ => Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(|_| entropy.byte())).into(),
        }
    }
}

/// `[address, port, flow label, scope]`; the last two are 0 for IPv4.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SocketAddressV1(pub Bytes, pub u16, pub u32, pub u32);

impl Wire<SocketAddr> for SocketAddressV1 {
    fn from_live(live: &SocketAddr) -> SocketAddressV1 {
        let (flow, scope) = match live {
            SocketAddr::V4(_) => (0, 0),
            SocketAddr::V6(address) => (address.flowinfo(), address.scope_id()),
        };
        SocketAddressV1(Bytes::from_live(&live.ip()), live.port(), flow, scope)
    }
    fn into_live(self, bounds: &Bounds) -> Result<SocketAddr, Invalid> {
        Ok(match self.0.into_live(bounds)? {
            IpAddr::V4(address) => SocketAddrV4::new(address, self.1).into(),
            IpAddr::V6(address) => SocketAddrV6::new(address, self.1, self.2, self.3).into(),
        })
    }
    fn any(entropy: &mut Entropy<'_>) -> SocketAddr {
        let (port, flow, scope) = (u16::any(entropy), u32::any(entropy), u32::any(entropy));
        match <Bytes as Wire<IpAddr>>::any(entropy) {
            IpAddr::V4(address) => SocketAddrV4::new(address, port).into(),
            IpAddr::V6(address) => SocketAddrV6::new(address, port, flow, scope).into(),
        }
    }
}
