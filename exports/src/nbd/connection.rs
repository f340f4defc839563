//! The life of one connection: handshake, requests, end.
//!
//! ```text
//! greeting -> options … -> (GO) -> requests … -> last replies -> gone
//!     \__________\__ deadline, error, server stop: gone
//! ```
//! One task receives and starts requests, which are tasks of their own; another one sends. The
//! receiving task stops reading when the connection is out of grants, so a client that pipelines
//! without end, or does not read, or whose disk is held by a cut, waits in its socket buffer.
//!
//! Order rule of the end: (1) no more requests start; (2) those in flight end and their replies
//! are sent, or dropped once the peer is gone or [`LINGER_NS`] have passed; (3) the sender ends;
//! (4) the export loses its user. A request that was admitted runs to its end in any case.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::net::Socket;
use zerocopy::IntoBytes;

use super::account::{Account, Side};
use super::export::Attached;
use super::handshake::{Features, Negotiation, Step};
use super::intake::Intake;
use super::outbox::Outbox;
use super::request::{Admission, Request, Session, admit, refuse, serve};
use super::server::ServerState;
use super::wire::{
    Greeting, OptionCode, OptionHeader, PAYLOAD_MAX, RequestHeader, handshake, magic,
};
use crate::limits::{LINGER_NS, OPTION_BYTES, RECEIVE_WINDOW};

/// Serves one client from its greeting to its end.
pub(crate) async fn run(server: Rc<ServerState>, socket: Socket, account: Rc<Account>) {
    let core = server.core().clone();
    let mut intake = Intake::new(&core, &socket);
    let started = select(
        negotiate(&server, &account, &socket, &mut intake),
        deadline(&core, server.handshake_seconds()),
    );
    match started.await {
        Either::First(Ok(Some((attached, features)))) => {
            intake.grow(&core, RECEIVE_WINDOW);
            transmit(core, socket, Rc::clone(&account), intake, attached, features).await;
        }
        Either::First(Ok(None)) => {}
        Either::First(Err(error)) => tracing::debug!(%error, "an NBD client left its handshake"),
        Either::Second(()) => tracing::warn!("an NBD client took too long for its handshake"),
    }
    account.close();
}

async fn deadline(core: &Core, seconds: u32) {
    match seconds {
        0 => std::future::pending().await,
        seconds => core.sleep(u64::from(seconds) * 1_000_000_000).await,
    }
}

/// Greets and answers options; what the client started, or `None` if it (or we) gave up.
async fn negotiate(
    server: &ServerState,
    account: &Rc<Account>,
    socket: &Socket,
    intake: &mut Intake,
) -> Result<Option<(Attached, Features)>> {
    let core = server.core();
    let greeting = Greeting::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    send(core, socket, greeting.as_bytes()).await?;
    let Some(flags) = intake.head::<4>().await? else { return Ok(None) };
    let Some(mut negotiation) = Negotiation::new(u32::from_be_bytes(flags)) else {
        return Ok(None);
    };
    loop {
        let Some(head) = intake.head::<{ OptionHeader::SIZE }>().await? else { return Ok(None) };
        let Ok(head) = OptionHeader::decode(&head) else { return Ok(None) };
        let length = head.length.get();
        if head.magic.get() != magic::OPTION || length > PAYLOAD_MAX {
            return Ok(None);
        }
        let option = OptionCode::from_number(head.option.get());
        let answer = if length > OPTION_BYTES {
            if !intake.skip(length).await? {
                return Ok(None);
            }
            Answer::of(negotiation.answer_too_long(option))
        } else {
            let Some(data) = intake.vector(length as usize).await? else { return Ok(None) };
            server.answer(&mut negotiation, option, &data, account)
        };
        match answer {
            Answer::Continue(reply) => send(core, socket, &reply).await?,
            Answer::Start(reply, attached, features) => {
                send(core, socket, &reply).await?;
                return Ok(Some((attached, features)));
            }
            Answer::End(reply) => {
                // The client may have gone already; it loses nothing.
                let _ = send(core, socket, &reply).await;
                return Ok(None);
            }
        }
    }
}

/// A [`Step`] with the export that was picked held for this connection.
pub(crate) enum Answer {
    Continue(Vec<u8>),
    Start(Vec<u8>, Attached, Features),
    End(Vec<u8>),
}

impl Answer {
    /// The answer that a step without a start means.
    pub(crate) fn of(step: Step) -> Self {
        match step {
            Step::Answer(reply) => Self::Continue(reply),
            Step::End(reply) | Step::Start(reply, ..) => Self::End(reply),
        }
    }
}

async fn send(core: &Core, socket: &Socket, bytes: &[u8]) -> Result<()> {
    let buf = core.pool().alloc(bytes.len());
    buf.copy_from(0, bytes);
    socket.send(buf).await
}

/// Serves requests until the client ends the connection or the server closes it.
async fn transmit(
    core: Core,
    socket: Socket,
    account: Rc<Account>,
    mut intake: Intake,
    attached: Attached,
    features: Features,
) {
    let outbox = Outbox::new(&core);
    let sending = Rc::clone(&outbox).run(core.clone(), socket, Rc::clone(&account));
    let sender = core.spawn(Class::Guest, sending);
    let session = Rc::new(Session::new(&core, Rc::clone(&outbox), attached, features));
    if let Err(error) = receive(&session, &account, &mut intake).await {
        tracing::debug!(%error, "an NBD client went away");
    }
    drop(intake);
    if let Either::Second(()) = select(account.idle(), core.sleep(LINGER_NS)).await {
        account.close();
        account.idle().await;
    }
    outbox.close();
    sender.await;
}

/// Receives and starts requests until the stream ends.
async fn receive(session: &Rc<Session>, account: &Rc<Account>, intake: &mut Intake) -> Result<()> {
    while let Some(head) = intake.head::<{ RequestHeader::SIZE }>().await? {
        let Ok(request) = Request::decode(&head) else {
            // What follows cannot be told apart from requests any more.
            return Ok(());
        };
        let admission = admit(session, &request);
        if let Admission::Disconnect = admission {
            return Ok(());
        }
        let Some(grant) = account.grant(request.memory(&admission)).await else { return Ok(()) };
        match admission {
            Admission::Serve => {
                let Some(payload) = payload(session, account, intake, &request).await? else {
                    return Ok(());
                };
                let task = serve(Rc::clone(session), request, payload, grant);
                drop(session.core().spawn(Class::Guest, task));
            }
            Admission::Refuse(refusal) => {
                let fatal = refusal.fatal;
                if !fatal && !intake.skip(request.payload()).await? {
                    return Ok(());
                }
                refuse(session, &request, &refusal, grant);
                if fatal {
                    return Ok(());
                }
            }
            Admission::Disconnect => return Ok(()),
        }
    }
    Ok(())
}

/// The payload of a request (empty for all but WRITE); `None` if the stream ends before.
async fn payload(
    session: &Session,
    account: &Account,
    intake: &mut Intake,
    request: &Request,
) -> Result<Option<Buf>> {
    let len = request.payload() as usize;
    let buf = session.core().pool().alloc(len);
    let here = intake.has(len);
    if !here {
        account.wait_for_peer(Side::Receiving, true);
    }
    let whole = intake.fill(&buf).await?;
    if !here {
        account.wait_for_peer(Side::Receiving, false);
    }
    Ok(whole.then_some(buf))
}
