/**
 * swarmcore's stream protocol, as far as an echo and the one who checks it need it.
 *
 * A frame is `u8 kind | u32 length | u32 value`, little-endian, and `length` bytes. Both sides begin with a
 * HELLO that holds their settings, then the dialler sends OPEN. Messages travel in parts, paid for with the
 * credit that the other side grants.
 */
import { byteStream } from '@libp2p/utils'

export const PROTOCOL = '/swarmcore/stream/1'

const FrameType = {
  HELLO: 1, OPEN: 3, MESSAGE: 4, MORE: 5, CREDIT: 6, END: 7, CLOSE: 8, ABORT: 9, HEARTBEAT: 10
}
const HEADER_BYTES = 9
const SETTINGS_BYTES = 12
const MAX_PART = 2 ** 18
const MESSAGE_COST = 256 // credit that a message costs on top of its bytes
const WINDOW = 2 ** 20
const MAX_MESSAGE = 2 ** 28
const HEARTBEAT_MS = 5000

class FramedStream {
  #bytes
  #credit = 0
  #queue = []
  #changed = Promise.withResolvers()
  #error
  #heartbeat

  constructor (stream) {
    this.stream = stream
    this.#bytes = byteStream(stream, { maxBufferSize: 4 * WINDOW })
  }

  async greet () {
    const settings = Buffer.alloc(SETTINGS_BYTES)
    settings.writeUInt32LE(MAX_MESSAGE)
    settings.writeUInt32LE(WINDOW, 4)
    settings.writeUInt32LE(HEARTBEAT_MS, 8)
    await this.send(FrameType.HELLO, settings)
    const { kind, body } = await this.#receive()
    // A dialler of ours says behind its settings by which name it may move this stream to another connection.
    if (kind !== FrameType.HELLO || body.length < SETTINGS_BYTES) throw new Error(`frame ${kind} instead of a hello`)
    this.#credit = body.readUInt32LE(4)
    const interval = Math.min(HEARTBEAT_MS, body.readUInt32LE(8)) / 2
    this.#heartbeat = setInterval(() => { this.send(FrameType.HEARTBEAT).catch(() => {}) }, interval)
    this.#read().catch(error => { this.#error = error }).finally(() => {
      clearInterval(this.#heartbeat)
      this.#wake()
    })
  }

  async send (kind, body = Buffer.alloc(0), value = 0) {
    const header = Buffer.alloc(HEADER_BYTES)
    header.writeUInt8(kind)
    header.writeUInt32LE(body.length, 1)
    header.writeUInt32LE(value, 5)
    await this.#bytes.write(Buffer.concat([header, body]))
  }

  /** Send a part as soon as there is credit for it, in smaller ones where that comes in drops. */
  async sendPart ({ kind, value, body }) {
    let sent = 0
    do {
      const cost = kind === FrameType.MESSAGE ? MESSAGE_COST : 0
      await this.#until(() => this.#credit > cost)
      const piece = body.subarray(sent, sent + this.#credit - cost)
      this.#credit -= cost + piece.length
      await this.send(kind, piece, value)
      sent += piece.length
      kind = FrameType.MORE
      value = 0
    } while (sent < body.length)
  }

  /** The next part of a message, END or CLOSE. */
  async take () {
    await this.#until(() => this.#queue.length > 0)
    return this.#queue.shift()
  }

  /** Give back what a part has cost the other side. */
  async grant ({ kind, body }) {
    await this.send(FrameType.CREDIT, undefined, body.length + (kind === FrameType.MESSAGE ? MESSAGE_COST : 0))
  }

  async #until (condition) {
    while (!condition()) {
      if (this.#error != null) throw this.#error
      await this.#changed.promise
    }
  }

  #wake () {
    this.#changed.resolve()
    this.#changed = Promise.withResolvers()
  }

  async #receive () {
    const header = Buffer.from((await this.#bytes.read({ bytes: HEADER_BYTES })).subarray())
    const length = header.readUInt32LE(1)
    if (length > MAX_PART) throw new Error(`a frame of ${length} bytes`)
    const body = length > 0 ? (await this.#bytes.read({ bytes: length })).subarray() : []
    return { kind: header.readUInt8(), value: header.readUInt32LE(5), body: Buffer.from(body) }
  }

  async #read () {
    for (;;) {
      const frame = await this.#receive()
      if (frame.kind === FrameType.ABORT) throw new Error(`aborted: ${frame.body}`)
      if (frame.kind === FrameType.CREDIT) this.#credit += frame.value
      if ([FrameType.MESSAGE, FrameType.MORE, FrameType.END, FrameType.CLOSE].includes(frame.kind)) this.#queue.push(frame)
      this.#wake()
    }
  }
}

/** Echo every message of every swarmcore stream that comes on this libp2p stream, until that ends. */
export async function echo (stream) {
  const framed = new FramedStream(stream)
  try {
    await framed.greet()
    for (;;) {
      const frame = await framed.take()
      if (frame.kind === FrameType.END || frame.kind === FrameType.CLOSE) {
        await framed.send(frame.kind)
      } else {
        await framed.sendPart(frame)
        await framed.grant(frame)
      }
    }
  } catch (error) {
    stream.abort(error)
  }
}

/** Send one message of each size (bytes) and check that each comes back the same. */
export async function checkEcho (stream, sizes) {
  const framed = new FramedStream(stream)
  await framed.greet()
  await framed.send(FrameType.OPEN)
  for (const [index, size] of sizes.entries()) {
    const message = Buffer.alloc(size, index + 1)
    const [echoed] = await Promise.all([receiveMessage(framed), sendMessage(framed, message)])
    if (!message.equals(echoed)) throw new Error(`the echo of ${size} bytes differs`)
  }
  await framed.send(FrameType.CLOSE)
  while ((await framed.take()).kind !== FrameType.CLOSE);
  await stream.close()
}

async function sendMessage (framed, message) {
  let at = 0
  do {
    const body = message.subarray(at, at + MAX_PART)
    await framed.sendPart(at === 0
      ? { kind: FrameType.MESSAGE, value: message.length, body }
      : { kind: FrameType.MORE, value: 0, body })
    at += body.length
  } while (at < message.length)
}

async function receiveMessage (framed) {
  const parts = []
  let missing
  do {
    const part = await framed.take()
    if (part.kind !== FrameType.MESSAGE && part.kind !== FrameType.MORE) throw new Error('the stream ended before the echo')
    missing = (part.kind === FrameType.MESSAGE ? part.value : missing) - part.body.length
    parts.push(part.body)
    await framed.grant(part)
  } while (missing > 0)
  return Buffer.concat(parts)
}
