// A picture as the network takes it: laid on white, in grey or in three colours, scaled with Lanczos
// resampling. The arithmetic is that of Pillow, to the bit where a picture is at least as wide as it is high:
// rows first, then columns. For some upright pictures Pillow takes columns first, which rounds otherwise.

const BITS = 22;  // of a weight's fraction, as in Pillow

function lanczos(x) {  // window of 3 on either side
  if (x < -3 || x >= 3) return 0;
  if (x === 0) return 1;
  const turn = Math.PI * x;
  return 3 * Math.sin(turn) * Math.sin(turn / 3) / (turn * turn);
}

function weightsOf(from, to) {  // for each new pixel: the first old one, and whole-number weights
  const scale = from / to, stretch = Math.max(scale, 1), reach = 3 * stretch, rows = [];
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach + 0.5), from);
    const found = [];
    for (let x = first; x < end; x++) found.push(lanczos((x - centre + 0.5) / stretch));
    const sum = found.reduce((a, b) => a + b, 0);
    const whole = found.map(w => Math.trunc(w / sum * 2 ** BITS + (w < 0 ? -0.5 : 0.5)));
    rows.push({ first, weights: whole });
  }
  return rows;
}

function resampled(pixels, lines, from, to, step, jump) {
  // `lines` lines of `from` pixels; neighbours are `step` apart, lines `jump`. Comes out line by line.
  const rows = weightsOf(from, to), out = new Uint8Array(lines * to);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < to; i++) {
      const { first, weights } = rows[i];
      let sum = 2 ** (BITS - 1);
      for (let k = 0; k < weights.length; k++) sum += pixels[line * jump + (first + k) * step] * weights[k];
      out[line * to + i] = Math.min(Math.max(Math.floor(sum / 2 ** BITS), 0), 255);
    }
  }
  return out;
}

function scaled(pixels, width, height, size) {  // one channel -> (size, size)
  let across = width, found = pixels;
  if (width !== size) {
    found = resampled(found, height, width, size, 1, width);
    across = size;
  }
  if (height === size) return found;
  const down = resampled(found, across, height, size, across, 1);  // column by column
  const upright = new Uint8Array(size * size);
  for (let x = 0; x < size; x++) for (let y = 0; y < size; y++) upright[y * size + x] = down[x * size + y];
  return upright;
}

function onWhite(value, alpha) {
  const t = value * alpha * 128 + 255 * (255 - alpha) * 128 + (128 << 7);
  return ((t >> 8) + t >> 8) >> 7;
}

export function prepare(image, size, channels) {  // ImageData -> Uint8Array (channels, size, size)
  const { data, width, height } = image, n = width * height;
  const colours = [new Uint8Array(n), new Uint8Array(n), new Uint8Array(n)];
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) colours[c][i] = onWhite(data[4 * i + c], data[4 * i + 3]);
  }
  const [red, green, blue] = colours;
  const grey = () => red.map((r, i) => (r * 19595 + green[i] * 38470 + blue[i] * 7471 + 0x8000) >> 16);
  const planes = channels === 1 ? [grey()] : colours;
  const out = new Uint8Array(channels * size * size);
  planes.forEach((plane, c) => out.set(scaled(plane, width, height, size), c * size * size));
  return out;
}
