//! The directory hash: half MD4 over unsigned bytes (`fs/ext4/hash.c`).

/// The last hash means "end of directory" to `readdir`, so no name may have it.
const END_OF_DIRECTORY: u32 = 0x7FFF_FFFF << 1;

/// The hash of `name` that orders it in an htree; the lowest bit is always clear.
pub(crate) fn half_md4(name: &[u8], seed: &[u8; 16]) -> u32 {
    let mut state = [0x6745_2301, 0xEFCD_AB89, 0x98BA_DCFE, 0x1032_5476];
    if seed.iter().any(|&b| b != 0) {
        for (word, bytes) in state.iter_mut().zip(seed.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
    }
    let mut rest = name;
    while !rest.is_empty() {
        transform(&mut state, &words(rest));
        rest = rest.get(32..).unwrap_or_default();
    }
    let hash = state[1] & !1;
    if hash == END_OF_DIRECTORY { (0x7FFF_FFFF - 1) << 1 } else { hash }
}

/// The first 32 bytes of `bytes` as words, padded with the length of what is left.
fn words(bytes: &[u8]) -> [u32; 8] {
    let length = (bytes.len() as u64 & 0xFF) as u32;
    let pad = (length | length << 8) * 0x0001_0001;
    let mut words = [pad; 8];
    for (word, part) in words.iter_mut().zip(bytes.chunks(4)) {
        *word = part.iter().fold(pad, |word, &byte| (word << 8).wrapping_add(u32::from(byte)));
    }
    words
}

fn transform(state: &mut [u32; 4], x: &[u32; 8]) {
    fn f(x: u32, y: u32, z: u32) -> u32 {
        z ^ (x & (y ^ z))
    }
    fn g(x: u32, y: u32, z: u32) -> u32 {
        (x & y).wrapping_add((x ^ y) & z)
    }
    fn h(x: u32, y: u32, z: u32) -> u32 {
        x ^ y ^ z
    }
    type Mix = fn(u32, u32, u32) -> u32;
    const ROUNDS: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (f, 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (g, 0x5A82_7999, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]),
        (h, 0x6ED9_EBA1, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in ROUNDS {
        for (step, &at) in order.iter().enumerate() {
            let sum = a.wrapping_add(mix(b, c, d)).wrapping_add(x[at]).wrapping_add(constant);
            let turned = sum.rotate_left(shifts[step % 4]);
            (a, b, c, d) = (d, turned, b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}
