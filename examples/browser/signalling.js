/**
 * How peers are reached: a signalling service passes signed envelopes between those who are connected to it.
 *
 * Nothing that it sends is believed: an answer counts when the peer that was dialled has signed it, for this negotiation.
 */
import { SwarmError, within } from './errors.js'
import { short, verify } from './identity.js'

const PATH = '/swarmcore/signalling/1'
const DESCRIPTION = 'swarmcore webrtc description 1\0'
const REGISTRATION = 'swarmcore webrtc registration 1\0'
const TIMEOUT = 10
const MAX_CANDIDATES = 33
const END_OF_CANDIDATES = 'end-of-candidates'
const ADDRESS = /^webrtc:(?:(wss?):)?\/\/([^/\s]+)\/(12D3Koo[1-9A-HJ-NP-Za-km-z]{45})$/
const encoder = new TextEncoder()

/** Read `webrtc://host:port/<peer id>`, or `webrtc:wss://…` with TLS. */
export function parseAddress (text) {
  const [whole, scheme, place, peer] = ADDRESS.exec(text.trim()) ?? []
  if (!whole) {
    throw new SwarmError('AddressError', `“${text}” is no address of a peer that a page can reach; ` +
      'expected webrtc://host:port/12D3Koo…')
  }
  return { url: `${scheme ?? 'ws'}://${place}${PATH}`, peer }
}

export class Signalling {
  #identity
  #socket
  #negotiations = new Map()
  #sending = Promise.resolve()
  #arriving = Promise.resolve()

  constructor (identity, socket) {
    this.#identity = identity
    this.#socket = socket
    socket.onmessage = event => { // one after the other, though checking each takes a while
      this.#arriving = this.#arriving.then(() => this.#arrived(event.data))
        .catch(error => console.warn('dropped what came by signalling:', error))
    }
    socket.onclose = () => {
      for (const negotiation of this.#negotiations.values()) negotiation.fail(gone(socket.url))
    }
  }

  /** Register `identity` at the service. Throws a PeerUnreachableError when that does not work. */
  static async connect (url, identity) {
    let socket
    try {
      socket = new WebSocket(url)
    } catch (error) { // a page that came by https asks for ws://
      throw new SwarmError('PeerUnreachableError', `signalling service ${url}: ${error.message}`)
    }
    try {
      const { nonce } = await next(socket, 'challenge')
      const signature = await identity.sign(joined(encoder.encode(REGISTRATION), unbase64(nonce)))
      const registered = next(socket, 'registered')
      socket.send(JSON.stringify({ type: 'register', peer: identity.peer, signature: base64(signature) }))
      await registered
    } catch (error) {
      socket.close()
      throw error
    }
    return new Signalling(identity, socket)
  }

  get open () {
    return this.#socket.readyState === WebSocket.OPEN
  }

  /** A negotiation with `peer`, in place of an earlier one of that `id`: a restart goes by the id of its offer. */
  begin (peer, id = base64(crypto.getRandomValues(new Uint8Array(16)))) {
    const negotiation = new Negotiation(peer, id, (kind, body) => this.#send(peer, id, kind, body))
    this.#negotiations.set(id, negotiation)
    return negotiation
  }

  /** Nothing more that comes for `negotiation` is wanted. */
  end (negotiation) {
    if (this.#negotiations.get(negotiation.id) === negotiation) this.#negotiations.delete(negotiation.id)
  }

  close () {
    this.#socket.close()
  }

  /** All in the order in which it is sent, though signing each takes a while. */
  #send (peer, id, kind, body) {
    const envelope = { sender: this.#identity.peer, receiver: peer, exchange: id, kind, body }
    this.#sending = this.#sending.then(async () => {
      const signature = base64(await this.#identity.sign(statement(envelope)))
      if (this.open) this.#socket.send(JSON.stringify({ type: 'envelope', ...envelope, signature }))
      else this.#negotiations.get(id)?.fail(gone(this.#socket.url))
    })
  }

  async #arrived (text) {
    const signal = JSON.parse(text)
    const negotiation = this.#negotiations.get(signal.exchange)
    if (negotiation == null) return
    const peer = short(negotiation.peer)
    if (signal.type === 'absent') {
      negotiation.fail(new SwarmError('PeerUnreachableError', `${peer} cannot be reached: ${signal.reason}`))
      return
    }
    const meant = signal.receiver === this.#identity.peer && signal.sender === negotiation.peer
    if (!meant || !await verify(signal.sender, statement(signal), unbase64(signal.signature))) {
      negotiation.fail(new SwarmError('PeerIdentityError', `${peer} did not sign what came in its name; the ` +
        'signalling service misdirects, or has changed it'))
      return
    }
    negotiation.received(signal.kind, signal.body)
  }
}

/** What two peers send to make a connection, or a new path for it. */
class Negotiation {
  #send
  #answer
  #resolve
  #described = false
  #candidates = []
  #early = []
  #take = candidate => this.#early.push(candidate)

  constructor (peer, id, send) {
    this.peer = peer
    this.id = id
    this.#send = send
    this.#answer = new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.fail = reject
    })
    this.#answer.catch(() => {}) // it may fail before anyone waits for it
  }

  /** Send a description, as `offer` or `restart`, and return the one that the peer answers. */
  async offer (kind, description) {
    this.#send(kind, description)
    this.#described = true
    this.#candidates = this.#candidates.filter(line => line === END_OF_CANDIDATES || !description.includes(line))
    this.#sendCandidates()
    return within(TIMEOUT, this.#answer, `the answer of ${short(this.peer)}`)
  }

  /** Send one of our candidates behind the description that it belongs to; null: there are no more. */
  candidateFound (candidate) {
    if (candidate?.candidate === '') return // the end of a part, of which there is but one
    this.#candidates.push(candidate ? withFragment(candidate) : END_OF_CANDIDATES)
    if (this.#described && this.#candidates.length === 1) queueMicrotask(() => this.#sendCandidates())
  }

  /** From now on `take` gets the peer's candidates; first those that have come already. */
  onCandidate (take) {
    this.#take = take
    this.#early.forEach(take)
  }

  received (kind, body) {
    if (kind === 'answer') this.#resolve(body)
    if (kind === 'candidate') body.split('\n').slice(0, MAX_CANDIDATES).forEach(line => this.#take(line))
    if (kind === 'refusal') {
      this.fail(new SwarmError('PeerUnreachableError', `${short(this.peer)} refuses: ${body.slice(0, 200)}`))
    }
  }

  #sendCandidates () {
    if (this.#candidates.length > 0) this.#send('candidate', this.#candidates.splice(0).join('\n'))
  }
}

/** A candidate in the notation of SDP, with the description that it belongs to. */
function withFragment ({ candidate, usernameFragment }) {
  return / ufrag /.test(candidate) || !usernameFragment ? candidate : `${candidate} ufrag ${usernameFragment}`
}

/** What is signed of an envelope: each part behind its length. */
function statement ({ sender, receiver, exchange, kind, body }) {
  const parts = [unbase64(exchange), ...[sender, receiver, kind, body].map(text => encoder.encode(text))]
  return joined(encoder.encode(DESCRIPTION), ...parts.flatMap(part => {
    const length = new DataView(new ArrayBuffer(4))
    length.setUint32(0, part.length, true)
    return [new Uint8Array(length.buffer), part]
  }))
}

/** The next signal, which has to be of this type. */
function next (socket, type) {
  return within(TIMEOUT, new Promise((resolve, reject) => {
    const fail = () => reject(gone(socket.url))
    socket.onerror = socket.onclose = fail
    socket.onmessage = event => {
      const signal = JSON.parse(event.data)
      if (signal.type === type) resolve(signal)
      else fail()
    }
  }), `signalling service ${socket.url}`)
}

function gone (url) {
  return new SwarmError('PeerUnreachableError', `signalling service ${url} does not answer, or hung up`)
}

function joined (...parts) {
  return new Uint8Array(parts.flatMap(part => [...part]))
}

function base64 (bytes) {
  return btoa(String.fromCharCode(...bytes))
}

function unbase64 (text) {
  return Uint8Array.from(atob(text), character => character.charCodeAt(0))
}
