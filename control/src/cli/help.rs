//! The texts of `-h`, `-V` and of help on objects and chardevs.

use crate::qmp::COMPATIBLE_VERSION;
use crate::schema::shared::OBJECT_OPTIONS;
use crate::schema::types::{Int, Member, ObjectType, Type};

/// The text of `-V`.
pub fn version() -> String {
    let (major, minor, micro) = COMPATIBLE_VERSION;
    format!(
        "liveblkd version {} (compatible with qemu-storage-daemon {major}.{minor}.{micro})\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The text of `-h`.
pub fn usage(program: &str) -> String {
    format!("Usage: {program} [options]\n{USAGE}")
}

const USAGE: &str = "\
Live block operations on virtual disks: serve, snapshot, mirror and back up while guests write.

  -h, --help             show this text and exit
  -V, --version          show the version and exit
  -T, --trace ARG        accepted for compatibility, without effect

Options below take effect in the order given; what an option refers to must stand before it.
Arguments are lists of key=value (a comma in a value is written twice) or a JSON object.

  --object [qom-type=]iothread,id=ID[,poll-max-ns=N][,...]
                         create an object; '--object help' lists the types
  --blockdev [driver=]file,node-name=NAME,filename=PATH[,...]
  --blockdev [driver=]raw|qcow2,node-name=NAME,file=NODE|file.driver=file,file.filename=PATH[,...]
                         open a block node. Options of every node: discard=ignore|unmap,
                         cache.direct=on|off, cache.no-flush=on|off, read-only=on|off,
                         auto-read-only=on|off, force-share=on|off
  --chardev stdio,id=ID
  --chardev socket,id=ID,path=PATH|host=HOST,port=PORT[,server=on][,wait=off]
                         a stream for a monitor
  --monitor [chardev=]ID[,mode=control][,pretty=on|off]
                         speak QMP on a chardev
  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N]
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,max-connections=N]
                         listen for NBD clients
  --export [type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,writable=on|off]
                         offer a node to NBD clients

  --pidfile PATH         write the process id to a file that is locked while the daemon lives
  --daemonize            go to the background once everything above is done

  --header-refs any|same-dir|explicit
                         which files an image's header may name as its backing: any, those in its
                         own folder or below (default), or none
  --allow-dir DIR        with same-dir: files in this folder or below may be named, too
";

/// The text of `--object help` and, for a known type, of `--object TYPE,help`.
pub(super) fn objects(type_name: Option<&str>) -> String {
    let cases = OBJECT_OPTIONS.variants.as_ref().map_or(&[][..], |variants| variants.cases);
    match cases.iter().find(|(name, _)| Some(*name) == type_name) {
        Some((name, properties)) => {
            format!("{name} options:\n{}", lines(properties))
        }
        None => {
            let mut text = "List of user creatable objects:\n".to_owned();
            cases.iter().for_each(|(name, _)| text.extend(["  ", name, "\n"]));
            text
        }
    }
}

fn lines(properties: &ObjectType) -> String {
    let mut members: Vec<&Member> = properties.members.iter().collect();
    members.sort_by_key(|member| member.name);
    members.iter().map(|member| format!("  {}=<{}>\n", member.name, word(&member.ty))).collect()
}

fn word(ty: &Type) -> &'static str {
    match ty {
        Type::Bool => "bool",
        Type::Int(Int::Size) => "size",
        Type::Int(_) => "int",
        _ => "string",
    }
}

/// The text of `--chardev help`.
pub(super) fn chardevs() -> String {
    "Available chardev backend types: \n  stdio\n  socket\n".to_owned()
}
