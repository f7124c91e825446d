//! Cached blocks on disk: what a restart would lose. One file a full block, named by what is in it.
//!
//! A file holds, little-endian: magic, version, block size, the identity of model, back end and cache layout, the block's
//! hash (which covers all tokens before it), its tokens, the length of the rows, the rows, and the SHA-256 of all that.
//! Files are written to a temporary name, synced and renamed by a thread of their own, and read and checked by another, so
//! that no step waits for a disk. Anything unexpected in a file is a miss, and the file is removed.

use crate::prefix_cache::BlockHash;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

const MAGIC: &[u8; 8] = b"MOELLNKV";
const VERSION: u32 = 1;
const CHECKSUM_BYTES: usize = 32;

/// Blocks that were read ahead of whoever wants them may take this much memory.
const MAX_READ_AHEAD_BYTES: usize = 64 << 20;

/// Blocks that wait to be written may take this much memory; more are not written.
const MAX_QUEUED_BYTES: u64 = 256 << 20;

/// Where cached blocks go and how many.
#[derive(Debug, Clone)]
pub struct DiskCacheOptions {
    /// A folder of its own; made if it is not there. One process at a time uses it.
    pub dir: PathBuf,
    /// Bytes that all its files may take: the least recently used go first.
    pub max_bytes: u64,
    /// Names the model's contents, e.g. the hash of its files.
    pub model_identity: String,
}

/// Why a folder cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum DiskCacheError {
    /// Another process uses it.
    #[error("{dir}: another process uses this cache folder, expected one at a time")]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// It cannot be made, read or locked.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskCacheStats {
    /// Bytes of all files.
    pub size_bytes: u64,
    /// Files.
    pub blocks: usize,
    /// Blocks read and used.
    pub hits: u64,
    /// Files that were damaged or of another version.
    pub corrupt: u64,
    /// Blocks written.
    pub written: u64,
    /// Blocks not written: the disk was too slow, full or failing.
    pub dropped: u64,
}

type Key = [u8; 32];

#[derive(Debug, Default)]
struct Index {
    /// Size and last use.
    files: HashMap<Key, (u64, u64)>,
    /// The least recently used first.
    order: BTreeMap<u64, Key>,
    clock: u64,
    stats: DiskCacheStats,
}

impl Index {
    fn insert(&mut self, key: Key, size_bytes: u64) {
        self.remove(&key);
        self.clock += 1;
        self.files.insert(key, (size_bytes, self.clock));
        self.order.insert(self.clock, key);
        self.stats.size_bytes += size_bytes;
        self.stats.blocks = self.files.len();
    }

    fn remove(&mut self, key: &Key) {
        if let Some((size_bytes, used)) = self.files.remove(key) {
            self.order.remove(&used);
            self.stats.size_bytes -= size_bytes;
            self.stats.blocks = self.files.len();
        }
    }

    fn oldest(&self) -> Option<Key> {
        self.order.first_key_value().map(|(_, key)| *key)
    }
}

struct Job {
    key: Key,
    /// The file without its checksum.
    content: Vec<u8>,
}

enum Message {
    Write(Job),
    Flush(Sender<()>),
}

/// Blocks to read, in order.
struct ReadJob {
    blocks: Vec<WantedBlock>,
    row_bytes: usize,
    rows: SyncSender<Vec<u8>>,
}

/// A block that somebody wants.
#[derive(Debug, Clone)]
pub struct WantedBlock {
    /// Its name.
    pub hash: BlockHash,
    /// Its tokens.
    pub tokens: Vec<u32>,
}

/// The files of a folder, as both threads and the engine see them.
#[derive(Clone)]
struct Store {
    dir: PathBuf,
    identity: Key,
    index: Arc<Mutex<Index>>,
}

/// An open folder.
pub struct DiskCache {
    store: Store,
    queued_bytes: Arc<AtomicU64>,
    messages: Option<Sender<Message>>,
    writer: Option<JoinHandle<()>>,
    reads: Option<Sender<ReadJob>>,
    reader: Option<JoinHandle<()>>,
    /// Held while the folder is in use.
    _lock: File,
}

impl DiskCache {
    /// Opens a folder for blocks of one model and `layout` (back end, cache types, block size).
    ///
    /// # Errors
    /// If another process uses it or the file system fails.
    pub fn open(options: &DiskCacheOptions, layout: &str) -> Result<Self, DiskCacheError> {
        let dir = options.dir.clone();
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| DiskCacheError::Io { path, source }
        };
        fs::create_dir_all(&dir).map_err(fail(&dir))?;
        let lock_path = dir.join("lock");
        let lock = File::create(&lock_path).map_err(fail(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskCacheError::Locked { dir }),
            Err(TryLockError::Error(source)) => return Err(DiskCacheError::Io { path: lock_path, source }),
        }
        let mut index = scan(&dir).map_err(fail(&dir))?;
        evict(&dir, &mut index, options.max_bytes);
        let index = Arc::new(Mutex::new(index));
        let queued_bytes = Arc::new(AtomicU64::new(0));
        let (messages, inbox) = mpsc::channel();
        let writer = Writer {
            dir: dir.clone(),
            max_bytes: options.max_bytes,
            index: Arc::clone(&index),
            queued_bytes: Arc::clone(&queued_bytes),
        };
        let writer = std::thread::Builder::new()
            .name("cache-writer".to_owned())
            .spawn(move || writer.run(&inbox))
            .map_err(fail(&dir))?;
        let mut hasher = Sha256::new();
        hasher.update((options.model_identity.len() as u64).to_le_bytes());
        hasher.update(&options.model_identity);
        hasher.update(layout);
        let store = Store { dir, identity: hasher.finalize().into(), index };
        let (reads, read_inbox) = mpsc::channel::<ReadJob>();
        let for_reader = store.clone();
        let reader = std::thread::Builder::new()
            .name("cache-reader".to_owned())
            .spawn(move || read_inbox.into_iter().for_each(|job| for_reader.read_all(job)))
            .map_err(fail(&store.dir))?;
        Ok(DiskCache {
            store,
            queued_bytes,
            messages: Some(messages),
            writer: Some(writer),
            reads: Some(reads),
            reader: Some(reader),
            _lock: lock,
        })
    }

    /// Whether a file of that block is there. It may still turn out to be damaged.
    pub fn contains(&self, hash: &BlockHash) -> bool {
        self.store.contains(hash)
    }

    /// Begins to read blocks, in order. Their rows come one by one; the receiver's end is the end of what could be read, and
    /// dropping it ends the reading.
    pub fn read(&self, blocks: Vec<WantedBlock>, row_bytes: usize) -> Receiver<Vec<u8>> {
        let ahead = (MAX_READ_AHEAD_BYTES / row_bytes.max(1)).max(1);
        let (rows, receiver) = mpsc::sync_channel(ahead);
        let reads = self.reads.as_ref().expect("the sender is there until the cache is dropped");
        // A reader that is gone reads nothing: the receiver ends at once.
        let _ = reads.send(ReadJob { blocks, row_bytes, rows });
        receiver
    }

    /// Queues a block to be written, unless it is there or too many are waiting.
    pub fn write(&self, hash: &BlockHash, tokens: &[u32], rows: &[u8]) {
        let mut content = self.store.header(hash, tokens, rows.len());
        content.extend_from_slice(rows);
        let size_bytes = content.len() as u64;
        if self.queued_bytes.load(Ordering::Relaxed) + size_bytes > MAX_QUEUED_BYTES {
            lock(&self.store.index).stats.dropped += 1;
            return;
        }
        self.queued_bytes.fetch_add(size_bytes, Ordering::Relaxed);
        let messages = self.messages.as_ref().expect("the sender is there until the cache is dropped");
        if messages.send(Message::Write(Job { key: self.store.key(hash), content })).is_err() {
            lock(&self.store.index).stats.dropped += 1;
        }
    }

    /// Waits until everything queued so far is on disk.
    pub fn flush(&self) {
        let (done, wait) = mpsc::channel();
        if self.messages.as_ref().is_some_and(|messages| messages.send(Message::Flush(done)).is_ok()) {
            // An error means that the writer is gone: nothing is left to wait for.
            let _ = wait.recv();
        }
    }

    /// Counts since the start.
    pub fn stats(&self) -> DiskCacheStats {
        lock(&self.store.index).stats
    }
}

impl Store {
    fn contains(&self, hash: &BlockHash) -> bool {
        lock(&self.index).files.contains_key(&self.key(hash))
    }

    fn read_all(&self, job: ReadJob) {
        for block in &job.blocks {
            let Some(rows) = self.read(&block.hash, &block.tokens, job.row_bytes) else { return };
            if job.rows.send(rows).is_err() {
                return;
            }
        }
    }

    /// The rows of a block of `tokens`; `None` if there is none or its file is not what it should be.
    fn read(&self, hash: &BlockHash, tokens: &[u32], row_bytes: usize) -> Option<Vec<u8>> {
        let key = self.key(hash);
        let (size_bytes, _) = lock(&self.index).files.get(&key).copied()?;
        let path = path_of(&self.dir, &key);
        let header = self.header(hash, tokens, row_bytes);
        let expected_bytes = header.len() + row_bytes + CHECKSUM_BYTES;
        let content = if size_bytes == expected_bytes as u64 { fs::read(&path).ok() } else { None };
        let mut index = lock(&self.index);
        match content.and_then(|content| verified_rows(content, &header, expected_bytes)) {
            Some(rows) => {
                index.insert(key, size_bytes);
                index.stats.hits += 1;
                mark_used(&path);
                Some(rows)
            }
            None => {
                tracing::warn!(file = %path.display(), "cached block is damaged or of another version, removed");
                let _ = fs::remove_file(&path);
                index.remove(&key);
                index.stats.corrupt += 1;
                None
            }
        }
    }

    fn key(&self, hash: &BlockHash) -> Key {
        Sha256::new().chain_update(self.identity).chain_update(hash).finalize().into()
    }

    fn header(&self, hash: &BlockHash, tokens: &[u32], row_bytes: usize) -> Vec<u8> {
        let mut header = Vec::with_capacity(96 + tokens.len() * 4 + row_bytes + CHECKSUM_BYTES);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(tokens.len() as u32).to_le_bytes());
        header.extend_from_slice(&self.identity);
        header.extend_from_slice(hash);
        tokens.iter().for_each(|token| header.extend_from_slice(&token.to_le_bytes()));
        header.extend_from_slice(&(row_bytes as u64).to_le_bytes());
        header
    }
}

impl Drop for DiskCache {
    /// Writes what is queued.
    fn drop(&mut self) {
        drop(self.messages.take());
        drop(self.reads.take());
        for thread in [self.writer.take(), self.reader.take()].into_iter().flatten() {
            // A panic of the writer has lost only files that a restart would have missed.
            let _ = thread.join();
        }
    }
}

fn lock(index: &Mutex<Index>) -> MutexGuard<'_, Index> {
    index.lock().unwrap_or_else(PoisonError::into_inner)
}

fn path_of(dir: &Path, key: &Key) -> PathBuf {
    let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    dir.join(name + ".kv")
}

fn key_of(name: &str) -> Option<Key> {
    let digits = name.strip_suffix(".kv").filter(|digits| digits.len() == 64 && digits.is_ascii())?;
    let mut key = [0; 32];
    for (index, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(key)
}

/// The rows of a file, if everything in it is as it should be.
fn verified_rows(mut content: Vec<u8>, header: &[u8], expected_bytes: usize) -> Option<Vec<u8>> {
    if content.len() != expected_bytes || !content.starts_with(header) {
        return None;
    }
    let checksum = content.split_off(expected_bytes - CHECKSUM_BYTES);
    (Sha256::digest(&content).as_slice() == checksum).then(|| content.split_off(header.len()))
}

/// Finds the files of a folder, least recently used first, and removes what an interrupted writer left.
fn scan(dir: &Path) -> io::Result<Index> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".tmp") {
            let _ = fs::remove_file(entry.path());
        } else if let Some(key) = key_of(&name) {
            let metadata = entry.metadata()?;
            found.push((metadata.modified()?, key, metadata.len()));
        }
    }
    found.sort_unstable();
    let mut index = Index::default();
    found.into_iter().for_each(|(_, key, size_bytes)| index.insert(key, size_bytes));
    Ok(index)
}

/// Gives a file the time of its use: so the order of use survives a restart. Without it, or where the clock was set
/// meanwhile, only that order is worse.
#[expect(clippy::disallowed_methods, reason = "times of files are all that is left of the order after a restart")]
fn mark_used(path: &Path) {
    let _ = File::options().append(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes the least recently used files until the rest fits.
fn evict(dir: &Path, index: &mut Index, max_bytes: u64) {
    while index.stats.size_bytes > max_bytes {
        let Some(key) = index.oldest() else { return };
        let _ = fs::remove_file(path_of(dir, &key));
        index.remove(&key);
    }
}

/// The thread that writes files.
struct Writer {
    dir: PathBuf,
    max_bytes: u64,
    index: Arc<Mutex<Index>>,
    queued_bytes: Arc<AtomicU64>,
}

impl Writer {
    fn run(&self, inbox: &Receiver<Message>) {
        while let Ok(message) = inbox.recv() {
            match message {
                Message::Write(job) => self.write(job),
                // The asker may have stopped waiting.
                Message::Flush(done) => drop(done.send(())),
            }
        }
    }

    fn write(&self, job: Job) {
        let queued = job.content.len() as u64;
        let size_bytes = queued + CHECKSUM_BYTES as u64;
        let wanted = !lock(&self.index).files.contains_key(&job.key) && size_bytes <= self.max_bytes;
        if wanted {
            let path = path_of(&self.dir, &job.key);
            let outcome = write_file(&path, &job.content);
            let mut index = lock(&self.index);
            match outcome {
                Ok(()) => {
                    index.insert(job.key, size_bytes);
                    index.stats.written += 1;
                    evict(&self.dir, &mut index, self.max_bytes);
                }
                Err(error) => {
                    tracing::warn!(file = %path.display(), %error, "cached block was not written");
                    index.stats.dropped += 1;
                }
            }
        }
        self.queued_bytes.fetch_sub(queued, Ordering::Relaxed);
    }
}

/// Writes content and checksum so that the name never belongs to half a file.
fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.write_all(&Sha256::digest(content))?;
        file.sync_data()?;
        fs::rename(&temporary, path)
    };
    let outcome = write();
    if outcome.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path, max_bytes: u64) -> DiskCacheOptions {
        DiskCacheOptions { dir: dir.to_owned(), max_bytes, model_identity: "model".to_owned() }
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|e| e == "kv")).collect()
    }

    #[test]
    fn blocks_survive_a_restart_and_belong_to_one_model_and_layout() {
        let folder = tempfile::tempdir().unwrap();
        let (hash, tokens, rows) = ([7; 32], [1, 2, 3, 4], [9u8; 100]);
        let cache = DiskCache::open(&options(folder.path(), 10_000), "f32").unwrap();
        assert!(matches!(DiskCache::open(&options(folder.path(), 1), "f32"), Err(DiskCacheError::Locked { .. })));
        cache.write(&hash, &tokens, &rows);
        cache.flush();
        assert!(cache.contains(&hash));
        drop(cache);
        let cache = DiskCache::open(&options(folder.path(), 10_000), "f32").unwrap();
        assert_eq!(cache.store.read(&hash, &tokens, 100).unwrap(), rows);
        assert_eq!(cache.stats().hits, 1);
        drop(cache);
        let other = DiskCache::open(&options(folder.path(), 10_000), "bf16").unwrap();
        assert!(!other.contains(&hash));
        drop(other);
        let other = DiskCacheOptions { model_identity: "other".to_owned(), ..options(folder.path(), 10_000) };
        assert!(!DiskCache::open(&other, "f32").unwrap().contains(&hash));
    }

    #[test]
    fn a_folder_that_takes_no_files_costs_blocks_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (hash, tokens, rows) = ([7; 32], [1, 2], [9u8; 8]);
        let cache = DiskCache::open(&options(folder.path(), 10_000), "f32").unwrap();
        cache.write(&hash, &tokens, &rows);
        cache.flush();
        // As a disk that goes away: permissions would not stop a test that root runs.
        fs::remove_dir_all(folder.path()).unwrap();
        cache.write(&[8; 32], &tokens, &rows);
        cache.flush();
        assert_eq!((cache.stats().written, cache.stats().dropped), (1, 1));
        assert!(!cache.contains(&[8; 32]));
        assert_eq!(cache.store.read(&hash, &tokens, 8), None);
        fs::create_dir(folder.path()).unwrap();
        cache.write(&[8; 32], &tokens, &rows);
        cache.flush();
        assert_eq!(cache.store.read(&[8; 32], &tokens, 8).as_deref(), Some(rows.as_slice()));
    }

    /// Linux has a file on a disk that is always full.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_costs_blocks_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (hash, tokens, rows) = ([7; 32], [1, 2], [9u8; 8]);
        let cache = DiskCache::open(&options(folder.path(), 10_000), "f32").unwrap();
        let path = path_of(folder.path(), &cache.store.key(&hash));
        std::os::unix::fs::symlink("/dev/full", path.with_extension("tmp")).unwrap();
        let error = write_file(&path, &rows).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "the disk is full: {error}");
        std::os::unix::fs::symlink("/dev/full", path.with_extension("tmp")).unwrap();
        cache.write(&hash, &tokens, &rows);
        cache.flush();
        let stats = cache.stats();
        assert_eq!((stats.written, stats.dropped, stats.size_bytes), (0, 1, 0));
        assert_eq!(cache.store.read(&hash, &tokens, 8), None);
        // Nothing half-written is left, and once there is room it is used.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the lock alone");
        cache.write(&hash, &tokens, &rows);
        cache.flush();
        assert_eq!(cache.store.read(&hash, &tokens, 8).as_deref(), Some(rows.as_slice()));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_a_miss() {
        let folder = tempfile::tempdir().unwrap();
        let (hash, tokens, rows) = ([7; 32], [1, 2], [9u8; 8]);
        let cache = DiskCache::open(&options(folder.path(), 10_000), "f32").unwrap();
        cache.write(&hash, &tokens, &rows);
        cache.flush();
        // As a bad sector: the name is there, reading it fails.
        let path = files(folder.path()).remove(0);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(cache.store.read(&hash, &tokens, 8), None);
        assert!(!cache.contains(&hash));
        assert_eq!((cache.stats().corrupt, cache.stats().size_bytes), (1, 0));
        cache.write(&hash, &tokens, &rows);
        cache.flush();
        assert_eq!((cache.stats().written, cache.stats().dropped), (1, 1));
    }

    /// Clocks are set back and forth. Times of files only say which was used last.
    #[test]
    fn a_clock_that_jumps_loses_no_block() {
        let folder = tempfile::tempdir().unwrap();
        let (tokens, rows) = ([1u32], [5u8; 100]);
        let cache = DiskCache::open(&options(folder.path(), 1 << 20), "f32").unwrap();
        let hashes: Vec<BlockHash> = (0..3).map(|i| [i; 32]).collect();
        for hash in &hashes {
            cache.write(hash, &tokens, &rows);
        }
        cache.flush();
        let paths: Vec<PathBuf> = hashes.iter().map(|hash| path_of(folder.path(), &cache.store.key(hash))).collect();
        let block_bytes = cache.stats().size_bytes / 3;
        drop(cache);
        let century = std::time::Duration::from_secs(100 * 365 * 86_400);
        let epoch = SystemTime::UNIX_EPOCH;
        let times = [epoch + 2 * century, epoch - century / 2, epoch];
        for (path, time) in paths.iter().zip(times) {
            File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
        }
        let cache = DiskCache::open(&options(folder.path(), 1 << 20), "f32").unwrap();
        assert!(hashes.iter().all(|hash| cache.store.read(hash, &tokens, 100).is_some()));
        drop(cache);
        for (path, time) in paths.iter().zip(times) {
            File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
        }
        // The one from before the clock's beginning is the oldest.
        let cache = DiskCache::open(&options(folder.path(), 2 * block_bytes), "f32").unwrap();
        assert_eq!([0, 1, 2].map(|i| cache.contains(&hashes[i])), [true, false, true]);
    }

    #[test]
    fn every_damaged_byte_is_a_miss() {
        let folder = tempfile::tempdir().unwrap();
        let (hash, tokens, rows) = ([7; 32], [1, 2], [9u8; 8]);
        let cache = DiskCache::open(&options(folder.path(), 10_000), "f32").unwrap();
        cache.write(&hash, &tokens, &rows);
        cache.flush();
        let path = files(folder.path()).remove(0);
        let sound = fs::read(&path).unwrap();
        for position in 0..sound.len() {
            let mut damaged = sound.clone();
            damaged[position] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(cache.store.read(&hash, &tokens, 8), None, "byte {position}");
            assert!(!path.exists() && !cache.contains(&hash));
            cache.write(&hash, &tokens, &rows);
            cache.flush();
        }
        fs::write(&path, &sound[..sound.len() - 1]).unwrap();
        assert_eq!(cache.store.read(&hash, &tokens, 8), None);
        assert_eq!(cache.stats().corrupt, sound.len() as u64 + 1);
    }

    #[test]
    fn blocks_are_read_in_order_as_far_as_they_are_sound() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(&options(folder.path(), 1 << 20), "f32").unwrap();
        let wanted: Vec<WantedBlock> =
            (0..4).map(|i| WantedBlock { hash: [i; 32], tokens: vec![u32::from(i)] }).collect();
        for block in &wanted {
            cache.write(&block.hash, &block.tokens, &[block.hash[0]; 64]);
        }
        cache.flush();
        let found: Vec<Vec<u8>> = cache.read(wanted.clone(), 64).into_iter().collect();
        assert_eq!(found, (0..4).map(|i| vec![i; 64]).collect::<Vec<_>>());
        // A reader that nobody listens to, then one that meets a damaged file.
        drop(cache.read(wanted.clone(), 64));
        fs::write(path_of(folder.path(), &cache.store.key(&wanted[2].hash)), b"damaged").unwrap();
        assert_eq!(cache.read(wanted, 64).into_iter().count(), 2);
        assert_eq!(cache.stats().corrupt, 1);
    }

    #[test]
    fn the_least_recently_used_files_go_first_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let (tokens, rows) = ([1u32], [0u8; 1000]);
        let block_bytes = 8 + 4 + 4 + 32 + 32 + 4 + 8 + 1000 + 32;
        let hash = |i: u8| [i; 32];
        let cache = DiskCache::open(&options(folder.path(), 3 * block_bytes), "f32").unwrap();
        for i in 0..3 {
            cache.write(&hash(i), &tokens, &rows);
            cache.flush();
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert!(cache.store.read(&hash(0), &tokens, 1000).is_some());
        cache.write(&hash(3), &tokens, &rows);
        cache.flush();
        assert_eq!([0, 1, 2, 3].map(|i| cache.contains(&hash(i))), [true, false, true, true]);
        assert_eq!(cache.stats().size_bytes, 3 * block_bytes);
        drop(cache);
        fs::write(folder.path().join("interrupted.tmp"), b"half").unwrap();
        let cache = DiskCache::open(&options(folder.path(), 2 * block_bytes), "f32").unwrap();
        assert_eq!([0, 1, 2, 3].map(|i| cache.contains(&hash(i))), [true, false, false, true]);
        assert_eq!(files(folder.path()).len(), 2);
        assert!(!folder.path().join("interrupted.tmp").exists());
    }
}
