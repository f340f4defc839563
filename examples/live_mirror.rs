//! Opens a chain, writes to it, mirrors it to a new image meanwhile, and pivots.

use liveblk::{HostError, run};

fn main() -> Result<(), HostError> {
    let dir = std::env::temp_dir().join(format!("liveblk-example-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary folder can be made");
    let (base, top, new) = (dir.join("a.qcow2"), dir.join("b.qcow2"), dir.join("e.qcow2"));
    let remove = dir.clone();
    let result = run(|host| async move {
        host.create(&base, "qcow2", 64 << 20).await?;
        host.create_overlay(&top, &base, "qcow2").await?;
        host.create(&new, "qcow2", 64 << 20).await?;
        let source = host.open_chain("disk", &[("qcow2", &base), ("qcow2", &top)]).await?;
        let target = host.open(host.image(&new, "qcow2").named("new")).await?;
        let disk = host.attach(&source)?;
        disk.write(0, host.buffer(b"before the mirror"), Default::default()).await?;

        let job = host.mirror("job0", &source, &target).await?;
        disk.write(4096, host.buffer(b"during the mirror"), Default::default()).await?;
        host.ready(&job).await?;
        host.complete(&job).await?;

        let text = host.space(17);
        disk.read(4096, text.clone()).await?;
        let text = String::from_utf8_lossy(&text.to_vec()).into_owned();
        println!("served by '{}': {text}", disk.node_name());
        Ok(())
    });
    std::fs::remove_dir_all(&remove).expect("the temporary folder can be removed");
    result
}
