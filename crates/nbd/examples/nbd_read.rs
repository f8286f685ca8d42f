//! Reads a whole export and prints the rate: `nbd_read URI [CONNECTIONS [DEPTH [KIB_PER_REQUEST [PASSES]]]]`.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use virtward_nbd::{Address, BASE_ALLOCATION, Client, Options};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let uri = arguments.next().ok_or("usage: nbd_read URI [CONNECTIONS [DEPTH [KIB_PER_REQUEST [PASSES]]]]")?;
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (connections, queue_depth) = (number(1)?, number(8)?);
    let request_bytes = number(1024)? as u64 * 1024;
    let passes = number(3)?;
    let (address, export) = Address::parse_uri(&uri)?;
    let contexts = vec![BASE_ALLOCATION.to_string()];
    let options = Options { export, contexts, connections, queue_depth, ..Options::default() };
    let client = Client::connect(&address, options).await?;
    if client.info().contexts.is_empty() {
        println!("the server tells no extents");
    } else {
        // As a backup does. It also makes qemu fast: after a large allocation was freed, glibc takes the buffers of
        // reads from the heap; before, it maps and unmaps memory for each, which costs more than the read.
        let extents = client.extents(BASE_ALLOCATION, 0..client.info().size_bytes)?.collect().await?;
        println!("{} extents", extents.len());
    }
    // Further connections join after the first.
    tokio::time::sleep(Duration::from_millis(100)).await;
    println!("{} connections, depth {queue_depth}, {} KiB per request", client.connections_up(), request_bytes >> 10);
    for _ in 0..passes {
        let began = Instant::now();
        read_all(&client, connections * queue_depth, request_bytes).await?;
        let seconds = began.elapsed().as_secs_f64();
        println!("{:.0} MB/s ({seconds:.3} s)", client.info().size_bytes as f64 / 1e6 / seconds);
    }
    client.disconnect().await;
    Ok(())
}

/// As many tasks as requests fit in flight; each reuses its buffer.
async fn read_all(client: &Client, tasks: usize, request_bytes: u64) -> Result<(), Box<dyn Error>> {
    let next = Arc::new(AtomicU64::new(0));
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..tasks {
        let (client, next) = (client.clone(), next.clone());
        readers.spawn(async move {
            let mut buffer = BytesMut::new();
            loop {
                let offset = next.fetch_add(request_bytes, Ordering::Relaxed);
                let left = client.info().size_bytes.saturating_sub(offset);
                if left == 0 {
                    return Ok(());
                }
                buffer = client.read_into(offset, left.min(request_bytes) as u32, buffer).await?;
            }
        });
    }
    while let Some(reader) = readers.join_next().await {
        reader?.map_err(|error: virtward_nbd::Error| error)?;
    }
    Ok(())
}
