//! A step's batch on the device: tokens, positions, where keys and values lie, angles.

use apr_core::batch::Batch;
use apr_core::rope::Rope;

use crate::driver::{Arg, Result};
use crate::kv::KvCache;
use crate::memory::{Buffer, Device};
use crate::tensor::ensure;

/// Numbers that the host writes once per step. Their buffers stay where they are, so that the launches of like steps are equal.
#[derive(Default)]
pub(crate) struct DeviceBatch {
    /// Whether a step is under way, whose ops all come with one batch; outside of one each may come with another.
    in_step: bool,
    rows_are_there: bool,
    blocks_are_there: bool,
    angles_are_there: bool,
    n_gathered: usize,
    tokens: Option<Buffer>,
    positions: Option<Buffer>,
    tables: Option<Buffer>,
    blocks: Option<Buffer>,
    inv_freq: Option<Buffer>,
    rope: Option<Rope>,
    cosines: Option<Buffer>,
    sines: Option<Buffer>,
    gathered: Vec<Option<Buffer>>,
}

/// Where a step's keys and values are found.
pub(crate) struct Places {
    /// `[n_blocks of all sequences]`, addresses
    pub blocks: Arg,
    /// `[n_tokens]`, where in `blocks` the token's sequence begins
    pub tables: Arg,
    /// `[n_tokens]`
    pub positions: Arg,
}

/// Writes numbers into a buffer that grows where it must.
fn put<T: bytemuck::NoUninit>(device: &Device, buffer: &mut Option<Buffer>, values: &[T]) -> Result<Arg> {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    ensure(device, buffer, bytes.len().next_power_of_two().max(64))?;
    let buffer = buffer.as_mut().expect("it was ensured");
    buffer.write(0, bytes)?;
    Ok(buffer.arg())
}

fn arg_of(buffer: &Option<Buffer>) -> Arg {
    buffer.as_ref().map_or(Arg::Address(0), Buffer::arg)
}

impl DeviceBatch {
    /// Begins or ends a step.
    pub fn set_step(&mut self, in_step: bool) {
        self.in_step = in_step;
        (self.rows_are_there, self.blocks_are_there, self.angles_are_there) = (false, false, false);
        self.n_gathered = 0;
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
            put(device, &mut self.tokens, &column(|r| r.token))?;
            put(device, &mut self.positions, &column(|r| r.position))?;
            self.rows_are_there = true;
        }
        Ok(())
    }

    /// `[n_tokens]`, the tokens.
    pub fn tokens(&mut self, device: &Device, batch: &Batch) -> Result<Arg> {
        self.refresh(device)?;
        self.put_rows(device, batch)?;
        Ok(arg_of(&self.tokens))
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
            put(device, &mut self.blocks, &blocks)?;
            put(device, &mut self.tables, &tables)?;
            self.blocks_are_there = true;
        }
        let [blocks, tables, positions] = [&self.blocks, &self.tables, &self.positions].map(arg_of);
        Ok(Places { blocks, tables, positions })
    }

    /// Cosines and sines of the batch's positions, `[n_tokens, n_pair]` each.
    pub fn angles(&mut self, device: &Device, batch: &Batch, rope: &Rope) -> Result<[Arg; 2]> {
        self.refresh(device)?;
        self.put_rows(device, batch)?;
        if self.rope.as_ref() != Some(rope) {
            // What waits was launched with the other rotation.
            device.flush()?;
            put(device, &mut self.inv_freq, &rope.inv_freq)?;
            self.rope = Some(rope.clone());
            self.angles_are_there = false;
        }
        let (n_rows, n_pair) = (batch.rows().len(), rope.inv_freq.len());
        if !self.angles_are_there {
            let n_bytes = (n_rows * n_pair * 4).next_power_of_two();
            ensure(device, &mut self.cosines, n_bytes)?;
            ensure(device, &mut self.sines, n_bytes)?;
            let [cosines, sines, positions, inv_freq] =
                [&self.cosines, &self.sines, &self.positions, &self.inv_freq].map(arg_of);
            let args = [cosines, sines, positions, inv_freq, n_pair.into(), rope.magnitude.into()];
            device.launch("rope_angles", 128, [n_rows, 1, 1], &args);
            self.angles_are_there = true;
        }
        Ok([&self.cosines, &self.sines].map(arg_of))
    }

    /// Indices of rows that an op keeps.
    pub fn kept(&mut self, device: &Device, rows: &[u32]) -> Result<Arg> {
        self.refresh(device)?;
        if self.gathered.len() == self.n_gathered {
            self.gathered.push(None);
        }
        let buffer = &mut self.gathered[self.n_gathered];
        self.n_gathered += 1;
        put(device, buffer, rows)
    }
}
