/**
 * A stream of whole messages over a data channel, with flow control of its own: `/swarmcore/stream/1`.
 *
 * A frame is `u8 kind | u32 length | u32 value`, little-endian, and `length` bytes; how frames are cut into messages of
 * the channel means nothing. A sender spends the credit that the receiver grants.
 */
import { SwarmError, within } from './errors.js'

const FrameType = {
  HELLO: 1, OPEN: 3, MESSAGE: 4, MORE: 5, CREDIT: 6, END: 7, CLOSE: 8, ABORT: 9, HEARTBEAT: 10, DISMISS: 11
}
const HEADER = 9
const MAX_PART = 2 ** 18
const MESSAGE_COST = 256
const WINDOW = 2 ** 21
/** So that any message fits the window as a whole: credit is then granted when a message is taken, and at no other time. */
const MAX_MESSAGE = WINDOW - MESSAGE_COST
export const KEEPALIVE = 2000 // three times that without a byte, and the connection is lost
const PIECE = 2 ** 14 // what every browser sends as one message of a channel
const HIGH_WATER = 2 ** 20
const OPEN_TIMEOUT = 10
const CLOSE_TIMEOUT = 5

export class FramedStream {
  #channel
  #reader = new FrameReader()
  #waiting = new Set()
  #timers = []
  #settings
  #credit = 0
  #charged = 0
  #queue = []
  #arriving
  #ended = false
  #closed = false
  #error
  #sending = Promise.resolve()
  #heard = performance.now()

  constructor (channel) {
    this.#channel = channel
    channel.binaryType = 'arraybuffer'
    channel.bufferedAmountLowThreshold = HIGH_WATER / 2
    channel.onbufferedamountlow = () => this.#changed()
    channel.onopen = () => this.#changed()
    channel.onmessage = event => this.#arrived(event.data)
    channel.onclose = () => this.#fail(new SwarmError('ConnectionLostError', 'the connection broke'))
  }

  /** A stream over `channel`, which may still be opening and is closed with the stream. */
  static async open (channel) {
    const stream = new FramedStream(channel)
    try {
      await within(OPEN_TIMEOUT, stream.#handshake(), 'opening a stream')
    } catch (error) {
      stream.abort('the stream did not open')
      throw error
    }
    return stream
  }

  /** Whether nothing more comes of it. */
  get ended () {
    return this.#closed || this.#ended || this.#error != null
  }

  /** Milliseconds since the peer was last heard on it. */
  get silence () {
    return performance.now() - this.#heard
  }

  /** Send one message, once there is credit for it. */
  send (message) {
    const sent = this.#sending.then(() => this.#send(message))
    this.#sending = sent.catch(() => {})
    return sent
  }

  /** The next message, or null when the other side has ended. */
  async receive () {
    await this.#until(() => this.#queue.length > 0 || this.#ended)
    const message = this.#queue.shift()
    if (message == null) return null
    const cost = message.length + MESSAGE_COST
    this.#charged -= cost
    if (!this.#ended) this.#write(FrameType.CREDIT, cost)
    return message
  }

  /** What was sent is delivered, what still comes is dropped. */
  async close () {
    if (this.#closed) return
    this.#write(FrameType.CLOSE)
    this.#closed = true
    const closed = this.#until(() => this.#ended)
    await within(CLOSE_TIMEOUT, closed, 'closing a stream').catch(() => {})
    this.#release()
  }

  /** Drop everything at once and tell the other side why. */
  abort (reason) {
    if (this.#closed) return
    const error = new SwarmError('StreamClosedError', `this side gave up: ${reason}`)
    this.#write(FrameType.ABORT, 0, new TextEncoder().encode(reason))
    this.#closed = true
    this.#fail(error)
  }

  async #handshake () {
    await this.#until(() => this.#channel.readyState === 'open')
    const settings = new DataView(new ArrayBuffer(12))
    for (const [i, value] of [MAX_MESSAGE, WINDOW, KEEPALIVE].entries()) settings.setUint32(4 * i, value, true)
    this.#write(FrameType.HELLO, 0, new Uint8Array(settings.buffer))
    await this.#until(() => this.#settings != null)
    this.#timers.push(
      setInterval(() => this.#write(FrameType.HEARTBEAT), Math.min(KEEPALIVE, this.#settings.keepalive) / 2),
      setInterval(() => this.#checkAlive(), KEEPALIVE / 2)
    )
    this.#write(FrameType.OPEN)
  }

  async #send (message) {
    const { maxMessage, window } = this.#settings
    if (message.length > maxMessage) {
      throw new SwarmError('MessageTooLargeError', `${message.length} bytes are more than the peer takes: ${maxMessage}`)
    }
    const part = Math.min(MAX_PART, Math.floor(window / 2) - MESSAGE_COST)
    let at = 0
    do {
      const body = message.subarray(at, at + part)
      const cost = body.length + (at === 0 ? MESSAGE_COST : 0)
      await this.#until(() => this.#credit >= cost && this.#channel.bufferedAmount < HIGH_WATER)
      this.#credit -= cost
      this.#write(at === 0 ? FrameType.MESSAGE : FrameType.MORE, at === 0 ? message.length : 0, body)
      at += body.length
    } while (at < message.length)
  }

  #write (kind, value = 0, body = new Uint8Array()) {
    if (this.#closed || this.#error || this.#channel.readyState !== 'open') return
    const frame = new Uint8Array(HEADER + body.length)
    const header = new DataView(frame.buffer)
    header.setUint8(0, kind)
    header.setUint32(1, body.length, true)
    header.setUint32(5, value, true)
    frame.set(body, HEADER)
    for (let at = 0; at < frame.length; at += PIECE) this.#channel.send(frame.subarray(at, at + PIECE))
  }

  #arrived (data) {
    this.#heard = performance.now()
    try {
      if (typeof data === 'string') throw violation('text on the channel')
      for (const frame of this.#reader.read(new Uint8Array(data))) this.#take(frame)
    } catch (error) {
      this.abort(error.message)
      this.#fail(error)
    }
    this.#changed()
  }

  #take ({ kind, value, body }) {
    if (this.#settings == null) this.#settings = settingsOf(kind, body)
    else if (kind === FrameType.MESSAGE || kind === FrameType.MORE) this.#part(kind, value, body)
    else if (kind === FrameType.CREDIT) this.#credit += value
    else if (kind === FrameType.END || kind === FrameType.CLOSE) this.#ended = true
    else if (kind === FrameType.ABORT) {
      this.#fail(new SwarmError('StreamAbortedError', new TextDecoder().decode(body).slice(0, 200)))
    } else if (kind !== FrameType.HEARTBEAT && kind !== FrameType.DISMISS) {
      throw violation(`frame ${kind} out of place`)
    }
    if (kind === FrameType.HELLO) this.#credit = this.#settings.window
  }

  #part (kind, value, body) {
    const first = kind === FrameType.MESSAGE
    if (this.#ended || first !== (this.#arriving == null)) throw violation('a part of a message out of place')
    if (first) {
      if (value > MAX_MESSAGE) throw violation(`a message of ${value} bytes`)
      this.#arriving = { parts: [], missing: value }
    }
    const message = this.#arriving
    message.parts.push(body)
    message.missing -= body.length
    this.#charged += body.length + (first ? MESSAGE_COST : 0)
    if (message.missing < 0 || this.#charged > WINDOW) throw violation('more than was announced or granted')
    if (message.missing > 0 && body.length === 0) throw violation('an empty part')
    if (message.missing === 0) {
      this.#arriving = null
      if (!this.#closed) this.#queue.push(joined(message.parts))
    }
  }

  #checkAlive () {
    if (performance.now() - this.#heard > 3 * KEEPALIVE) {
      this.#fail(new SwarmError('ConnectionLostError', 'the peer has fallen silent'))
    }
  }

  async #until (condition) {
    while (!condition()) {
      if (this.#error) throw this.#error
      await new Promise(resolve => this.#waiting.add(resolve))
    }
  }

  #changed () {
    for (const resume of this.#waiting) resume()
    this.#waiting.clear()
  }

  #fail (error) {
    this.#error ??= error
    this.#release()
    this.#changed()
  }

  #release () {
    this.#timers.forEach(clearInterval)
    this.#channel.close()
  }
}

/** Cuts what comes into frames. It is joined once for each frame, however small the pieces are. */
class FrameReader {
  #pieces = []
  #held = 0
  #needed = HEADER
  #rest

  /** The frames that are whole now. */
  read (data) {
    this.#pieces.push(data)
    this.#held += data.length
    const frames = []
    if (this.#held < this.#needed) return frames
    this.#rest = joined(this.#pieces)
    for (let frame; (frame = this.#next()) != null;) frames.push(frame)
    this.#pieces = [this.#rest]
    this.#held = this.#rest.length
    return frames
  }

  #next () {
    this.#needed = HEADER
    if (this.#rest.length < HEADER) return null
    const header = new DataView(this.#rest.buffer, this.#rest.byteOffset)
    const end = HEADER + header.getUint32(1, true)
    if (end > HEADER + MAX_PART) throw violation(`a frame of ${end} bytes`)
    this.#needed = end
    if (this.#rest.length < end) return null
    const frame = { kind: header.getUint8(0), value: header.getUint32(5, true), body: this.#rest.slice(HEADER, end) }
    this.#rest = this.#rest.subarray(end)
    return frame
  }
}

function settingsOf (kind, body) {
  if (kind !== FrameType.HELLO || body.length < 12) throw violation('no hello')
  const view = new DataView(body.buffer, body.byteOffset)
  const [maxMessage, window, keepalive] = [0, 4, 8].map(at => view.getUint32(at, true))
  if (window < 2 ** 14) throw violation(`only ${window} bytes granted`)
  return { maxMessage, window, keepalive: Math.max(keepalive, 500) }
}

function joined (parts) {
  if (parts.length === 1) return parts[0]
  const whole = new Uint8Array(parts.reduce((total, part) => total + part.length, 0))
  let at = 0
  for (const part of parts) {
    whole.set(part, at)
    at += part.length
  }
  return whole
}

function violation (what) {
  return new SwarmError('ProtocolError', `the peer breaks the stream protocol: ${what}`)
}
