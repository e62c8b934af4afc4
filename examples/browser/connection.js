/** One peer connection to one peer, and a data channel in it for each stream. */
import { SwarmError, within } from './errors.js'
import { FramedStream, KEEPALIVE } from './framed.js'
import { short } from './identity.js'

const LABEL = '/swarmcore/stream/1'
const CONNECT_TIMEOUT = 15
const WATCH_MS = 1000
const SILENCE = 1.5 * KEEPALIVE // after that without data a new path is looked for; a stream ends after three times

export class Connection {
  #rtc
  #connectSignalling
  #negotiation
  #endNegotiation = () => {}
  #streams = new Set()
  #restarting = null
  #watching

  constructor (peer, iceServers, connectSignalling) {
    this.peer = peer
    this.#connectSignalling = connectSignalling
    this.#rtc = new RTCPeerConnection({ iceServers })
    // Both sides have it from the start (negotiated): an offer needs one channel, and this one is open at once.
    this.#rtc.createDataChannel('swarmcore', { negotiated: true, id: 0 })
  }

  /**
   * Throws a PeerUnreachableError, or what the peer or the signalling service has to say. For a new path later on,
   * `connectSignalling` gives a `Signalling` that is connected then.
   */
  static async dial (peer, signalling, iceServers = [], connectSignalling = async () => signalling) {
    const connection = new Connection(peer, iceServers, connectSignalling)
    try {
      await connection.#connect(signalling)
    } catch (error) {
      connection.close()
      throw error
    }
    return connection
  }

  get alive () {
    return this.#rtc.connectionState === 'connected' || this.#rtc.connectionState === 'disconnected'
  }

  /** A new stream. */
  async openStream () {
    if (!this.alive) throw new SwarmError('ConnectionLostError', `the connection to ${short(this.peer)} broke`)
    const stream = await FramedStream.open(this.#rtc.createDataChannel(LABEL))
    this.#streams.add(stream)
    return stream
  }

  /**
   * Look for a new path: the network has changed, or the peer is silent. Streams go on, by the old path for as long as
   * that works. Throws what hinders it; one at a time.
   */
  restart () {
    this.#restarting ??= this.#connectSignalling()
      .then(signalling => this.#negotiate('restart', signalling))
      .finally(() => { this.#restarting = null })
    return this.#restarting
  }

  close () {
    clearInterval(this.#watching)
    this.#endNegotiation()
    this.#rtc.close()
  }

  async #connect (signalling) {
    const rtc = this.#rtc
    const connected = new Promise((resolve, reject) => {
      rtc.onconnectionstatechange = () => {
        if (rtc.connectionState === 'connected') resolve()
        if (rtc.connectionState === 'failed') {
          reject(new SwarmError('PeerUnreachableError', `no path to ${short(this.peer)} was found`))
        }
      }
    })
    connected.catch(() => {}) // the negotiation may fail first
    await this.#negotiate('offer', signalling)
    await within(CONNECT_TIMEOUT, connected, `connecting to ${short(this.peer)}`)
    rtc.onconnectionstatechange = () => {
      if (rtc.connectionState === 'disconnected') this.#findPath()
    }
    this.#watching = setInterval(() => this.#watchSilence(), WATCH_MS)
  }

  /** Exchange descriptions, and candidates as they are found; the latter go on after that. */
  async #negotiate (kind, signalling) {
    const rtc = this.#rtc
    this.#endNegotiation()
    const negotiation = this.#negotiation = signalling.begin(this.peer, this.#negotiation?.id)
    this.#endNegotiation = () => signalling.end(negotiation)
    rtc.onicecandidate = ({ candidate }) => negotiation.candidateFound(candidate)
    await rtc.setLocalDescription(await rtc.createOffer({ iceRestart: kind === 'restart' }))
    const answer = await negotiation.offer(kind, rtc.localDescription.sdp)
    await rtc.setRemoteDescription({ type: 'answer', sdp: answer })
    negotiation.onCandidate(candidate => addCandidate(rtc, candidate))
  }

  #watchSilence () {
    for (const stream of this.#streams) if (stream.ended) this.#streams.delete(stream)
    const silence = Math.min(...[...this.#streams].map(stream => stream.silence))
    if (this.#streams.size > 0 && silence > SILENCE) this.#findPath()
  }

  #findPath () {
    if (this.alive) this.restart().catch(error => console.info(`no other path to ${short(this.peer)}:`, error))
  }
}

/** One of the peer's; nonsense, or one that comes too late, does no harm. */
function addCandidate (rtc, candidate) {
  const init = candidate.startsWith('candidate:') ? { candidate, sdpMLineIndex: 0 } : null
  rtc.addIceCandidate(init).catch(error => console.debug('left out a candidate:', error))
}
