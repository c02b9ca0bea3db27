//! A step's batch on the device: tokens, positions, where keys and values lie, angles.

use apr_core::batch::Batch;
use apr_core::rope::Rope;

use crate::driver::{Arg, Result};
use crate::kv::KvCache;
use crate::memory::{Buffer, Device};
use crate::tensor::ensure;

/// Numbers that the host writes once per step. They stay where they are, so that the launches of like steps are equal.
#[derive(Default)]
pub(crate) struct DeviceBatch {
    /// Whether a step is under way, whose ops all come with one batch; outside of one each may come with another.
    in_step: bool,
    rows_are_there: bool,
    blocks_are_there: bool,
    /// Tokens that the tiles on the device have at most.
    tiles_of: Option<Option<usize>>,
    angles_are_there: bool,
    numbers: Numbers,
    tokens: Option<Arg>,
    positions: Option<Arg>,
    tables: Option<Arg>,
    blocks: Option<Arg>,
    inv_freq: Option<Buffer>,
    rope: Option<Rope>,
    cosines: Option<Buffer>,
    sines: Option<Buffer>,
    few: RowList,
    many: RowList,
    tiles: Option<Arg>,
    n_tiles: usize,
}

/// Rows that attention computes in one way.
#[derive(Default)]
struct RowList {
    n: usize,
    /// The longest context among them.
    n_kv: usize,
    rows: Option<Arg>,
}

/// Rows on the device: how many, the longest context, indices.
pub(crate) struct Listed {
    pub n: usize,
    pub n_kv: usize,
    pub rows: Arg,
}

/// How attention goes about a step's rows.
pub(crate) struct AttentionRows {
    /// One by one
    pub few: Listed,
    /// In tiles
    pub many: Listed,
    /// `[n_tiles, 4]`: first row, rows, which of `many` the first is, nothing
    pub tiles: Arg,
    pub n_tiles: usize,
}

/// Rows of a sequence in a step from which on they are put in tiles.
const MANY: usize = 16;

/// Where a step's keys and values are found.
pub(crate) struct Places {
    /// `[n_blocks of all sequences]`, addresses
    pub blocks: Arg,
    /// `[n_tokens]`, where in `blocks` the token's sequence begins
    pub tables: Arg,
    /// `[n_tokens]`
    pub positions: Arg,
}

/// Bytes of a chunk, unless what is put there is longer; and of what begins on a boundary.
const CHUNK_BYTES: usize = 1 << 16;
const ALIGNMENT: usize = 64;

/// What a step's launches read of the host's numbers, side by side, so that one copy takes them to the device. The same step finds each
/// in the same place again.
#[derive(Default)]
struct Numbers {
    chunks: Vec<Buffer>,
    /// Which chunk is being filled, and up to where.
    chunk: usize,
    n_used: usize,
}

impl Numbers {
    /// Begins again at the first place.
    fn clear(&mut self) {
        (self.chunk, self.n_used) = (0, 0);
    }

    /// Puts numbers behind those that were put before.
    fn put<T: bytemuck::NoUninit>(&mut self, device: &Device, values: &[T]) -> Result<Arg> {
        let mut bytes = bytemuck::cast_slice::<T, u8>(values).to_vec();
        // Powers of two, so that places stay the same for a while as contexts grow.
        bytes.resize(bytes.len().next_power_of_two().max(ALIGNMENT), 0);
        while self.chunks.get(self.chunk).is_some_and(|c| self.n_used + bytes.len() > c.n_bytes()) {
            (self.chunk, self.n_used) = (self.chunk + 1, 0);
        }
        if self.chunk == self.chunks.len() {
            self.chunks.push(device.alloc(bytes.len().max(CHUNK_BYTES))?);
        }
        let (chunk, at) = (&self.chunks[self.chunk], self.n_used);
        device.stage(chunk, at, &bytes);
        self.n_used += bytes.len();
        Ok(Arg::Address(chunk.address(at)))
    }
}

fn arg_of(buffer: &Option<Buffer>) -> Arg {
    buffer.as_ref().map_or(Arg::Address(0), Buffer::arg)
}

fn arg(place: Option<Arg>) -> Arg {
    place.unwrap_or(Arg::Address(0))
}

impl DeviceBatch {
    /// Begins or ends a step.
    pub fn set_step(&mut self, in_step: bool) {
        self.in_step = in_step;
        (self.rows_are_there, self.blocks_are_there, self.angles_are_there) = (false, false, false);
        self.tiles_of = None;
        self.numbers.clear();
    }

    /// Goes on with a step whose launches so far have been run: those that come are another to replay.
    pub fn go_on(&self, device: &Device) -> Result<()> {
        if self.in_step { device.begin_step() } else { Ok(()) }
    }

    /// Outside of a step what is on the device may be of another batch, and launches that wait may still need it.
    fn refresh(&mut self, device: &Device) -> Result<()> {
        if !self.in_step {
            device.flush()?;
            self.set_step(false);
        }
        Ok(())
    }

    fn put_rows(&mut self, device: &Device, batch: &Batch) -> Result<()> {
        if !self.rows_are_there {
            let column = |f: fn(&apr_core::batch::Row) -> u32| batch.rows().iter().map(f).collect::<Vec<u32>>();
            self.tokens = Some(self.numbers.put(device, &column(|r| r.token))?);
            self.positions = Some(self.numbers.put(device, &column(|r| r.position))?);
            self.rows_are_there = true;
        }
        Ok(())
    }

    /// `[n_tokens]`, the tokens.
    pub fn tokens(&mut self, device: &Device, batch: &Batch) -> Result<Arg> {
        self.refresh(device)?;
        self.put_rows(device, batch)?;
        Ok(arg(self.tokens))
    }

    /// Where the batch's keys and values lie in `kv`.
    pub fn places(&mut self, device: &Device, batch: &Batch, kv: &KvCache) -> Result<Places> {
        self.refresh(device)?;
        self.put_rows(device, batch)?;
        if !self.blocks_are_there {
            let (mut firsts, mut blocks) = (Vec::new(), Vec::new());
            for table in batch.tables() {
                firsts.push(blocks.len() as u32);
                blocks.extend(table.iter().map(|&block| kv.address(block)));
            }
            let tables: Vec<u32> = batch.rows().iter().map(|r| firsts[r.sequence as usize]).collect();
            self.blocks = Some(self.numbers.put(device, &blocks)?);
            self.tables = Some(self.numbers.put(device, &tables)?);
            self.blocks_are_there = true;
        }
        let [blocks, tables, positions] = [self.blocks, self.tables, self.positions].map(arg);
        Ok(Places { blocks, tables, positions })
    }

    /// The rows of sequences that have many of them in tiles of at most `per_tile`, the longest contexts first, and the others; all of
    /// them one by one where `per_tile` is none. Asked for after [`places`](Self::places).
    pub fn attention_rows(&mut self, device: &Device, batch: &Batch, per_tile: Option<usize>) -> Result<AttentionRows> {
        if self.tiles_of != Some(per_tile) {
            let (mut few, mut many, mut tiles) = (Vec::new(), Vec::new(), Vec::<[u32; 4]>::new());
            let mut first = 0;
            for rows in batch.rows().chunk_by(|a, b| a.sequence == b.sequence) {
                let indices = first..first + rows.len() as u32;
                first = indices.end;
                let Some(per_tile) = per_tile.filter(|_| rows.len() >= MANY) else {
                    few.extend(indices);
                    continue;
                };
                for at in indices.clone().step_by(per_tile) {
                    let part = many.len() as u32 + at - indices.start;
                    tiles.push([at, (indices.end - at).min(per_tile as u32), part, 0]);
                }
                many.extend(indices);
            }
            let position = |row: u32| batch.rows()[row as usize].position;
            tiles.sort_by_key(|t| std::cmp::Reverse(position(t[0] + t[1] - 1)));
            self.n_tiles = tiles.len();
            self.tiles = Some(self.numbers.put(device, &tiles)?);
            for (list, rows) in [(&mut self.few, few), (&mut self.many, many)] {
                list.n = rows.len();
                list.n_kv = rows.iter().map(|&r| position(r) as usize + 1).max().unwrap_or(0);
                list.rows = Some(self.numbers.put(device, &rows)?);
            }
            self.tiles_of = Some(per_tile);
        }
        let listed = |l: &RowList| Listed { n: l.n, n_kv: l.n_kv, rows: arg(l.rows) };
        let (few, many) = (listed(&self.few), listed(&self.many));
        Ok(AttentionRows { few, many, tiles: arg(self.tiles), n_tiles: self.n_tiles })
    }

    /// Cosines and sines of the batch's positions, `[n_tokens, n_pair]` each.
    pub fn angles(&mut self, device: &Device, batch: &Batch, rope: &Rope) -> Result<[Arg; 2]> {
        self.refresh(device)?;
        self.put_rows(device, batch)?;
        if self.rope.as_ref() != Some(rope) {
            // What waits was launched with the other rotation.
            device.flush()?;
            self.inv_freq = Some(device.alloc_with(bytemuck::cast_slice(&rope.inv_freq))?);
            self.rope = Some(rope.clone());
            self.angles_are_there = false;
        }
        let (n_rows, n_pair) = (batch.rows().len(), rope.inv_freq.len());
        if !self.angles_are_there {
            let n_bytes = (n_rows * n_pair * 4).next_power_of_two();
            ensure(device, &mut self.cosines, n_bytes)?;
            ensure(device, &mut self.sines, n_bytes)?;
            let [cosines, sines, inv_freq] = [&self.cosines, &self.sines, &self.inv_freq].map(arg_of);
            let args = [cosines, sines, arg(self.positions), inv_freq, n_pair.into(), rope.magnitude.into()];
            device.launch("rope_angles", 128, [n_rows, 1, 1], &args);
            self.angles_are_there = true;
        }
        Ok([&self.cosines, &self.sines].map(arg_of))
    }

    /// Indices of rows that an op keeps.
    pub fn kept(&mut self, device: &Device, rows: &[u32]) -> Result<Arg> {
        self.refresh(device)?;
        self.numbers.put(device, rows)
    }
}
