//! An allocator that lays memory against pages that must not be touched.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr::null_mut,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

/// A multiple of every system's page.
const PAGE: usize = 1 << 16;
/// Addresses that are taken from the system, and never given out twice.
const ARENA: usize = 1 << 40;

/// Start of the arena; 0 before there is one.
static START: AtomicUsize = AtomicUsize::new(0);
/// First address that has not been given out.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// The end that is guarded: 0 for none.
static GUARDED: AtomicUsize = AtomicUsize::new(0);

/// An end of a piece of memory.
#[derive(Debug, Clone, Copy)]
pub enum End {
    /// Nothing can be read before the first byte.
    First = 1,
    /// Nothing can be read after the last byte.
    Last = 2,
}

/// Runs with all memory that is taken meanwhile, by any thread, guarded at one end.
pub fn guarded<R>(end: End, run: impl FnOnce() -> R) -> R {
    if START.load(SeqCst) == 0 {
        // SAFETY: new memory of its own.
        let start = unsafe { map(null_mut(), ARENA, 0) } as usize;
        NEXT.store(start.next_multiple_of(PAGE) + PAGE, SeqCst);
        START.store(start, SeqCst);
    }
    GUARDED.store(end as usize, SeqCst);
    let result = run();
    GUARDED.store(0, SeqCst);
    result
}

/// Memory that nobody may touch.
///
/// # Safety
/// With `MAP_FIXED`, nobody uses what is there.
unsafe fn map(at: *mut u8, len: usize, flags: i32) -> *mut u8 {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the caller's condition.
    let mapped = unsafe { libc::mmap(at.cast(), len, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(mapped, libc::MAP_FAILED, "no {len} bytes of addresses");
    mapped.cast()
}

struct Guard;

#[global_allocator]
static GUARD: Guard = Guard;

// SAFETY: every piece is a range of its own of the arena, or the system's.
unsafe impl GlobalAlloc for Guard {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let end = GUARDED.load(SeqCst);
        if end == 0 || layout.size() == 0 || layout.align() > PAGE {
            // SAFETY: the caller's condition.
            return unsafe { System.alloc(layout) };
        }
        let len = layout.size().next_multiple_of(PAGE);
        let start = NEXT.fetch_add(len + PAGE, SeqCst);
        if start + len + PAGE > START.load(SeqCst) + ARENA {
            return null_mut();
        }
        let offset = if end == End::Last as usize { (len - layout.size()) & !(layout.align() - 1) } else { 0 };
        let start = start as *mut u8;
        // SAFETY: the range is inside of the arena and given out for the first time.
        unsafe {
            if libc::mprotect(start.cast(), len, libc::PROT_READ | libc::PROT_WRITE) != 0 {
                return null_mut();
            }
            let memory = start.add(offset);
            // As f32, bf16 and f16 alike this is NaN.
            memory.write_bytes(0xff, layout.size());
            memory
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        let (address, start) = (memory as usize, START.load(SeqCst));
        if start == 0 || !(start..start + ARENA).contains(&address) {
            // SAFETY: the caller's condition.
            return unsafe { System.dealloc(memory, layout) };
        }
        let first = (address & !(PAGE - 1)) as *mut u8;
        // SAFETY: the caller's condition; the range is the one that was given out.
        unsafe { map(first, layout.size().next_multiple_of(PAGE), libc::MAP_FIXED) };
    }
}
